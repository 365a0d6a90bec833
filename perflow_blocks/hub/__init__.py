"""Workflows as repositories: exported, published and loaded."""
