"""Assembling a pipeline in one chain of steps."""

from .pipeline_builder import PeRFlowPipelineBuilder

__all__ = ["PeRFlowPipelineBuilder"]
