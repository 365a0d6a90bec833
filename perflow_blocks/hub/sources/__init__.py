"""The source files that a tree of blocks needs, ready to lie in a repository."""

from .workflow import Mode, WorkflowSources, workflow_sources

__all__ = ["Mode", "WorkflowSources", "workflow_sources"]
