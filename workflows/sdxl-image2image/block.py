"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.workflows import PeRFlowSDXLImage2ImageBlocks

__all__ = ["PeRFlowSDXLImage2ImageBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# -----------------------------------------------------------------------------
