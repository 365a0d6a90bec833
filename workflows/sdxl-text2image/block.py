"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks

__all__ = ["PeRFlowSDXLText2ImageBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# --------------------------------------------------------------------------------
