"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.workflows import PeRFlowSDXLIPAdapterBlocks

__all__ = ["PeRFlowSDXLIPAdapterBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# -------------------------------------------------------------------------------------------------
