"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.workflows import PeRFlowSDXLControlNetBlocks

__all__ = ["PeRFlowSDXLControlNetBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# ------
