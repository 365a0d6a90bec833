"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks import PeRFlowSDXLAutoBlocks

__all__ = ["PeRFlowSDXLAutoBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# ------------------------------------------------------
