"""The blocks of a saved pipeline; needs the package perflow_blocks."""

from perflow_blocks.demo.blocks import PeRFlowDemoBlocks

__all__ = ["PeRFlowDemoBlocks"]

# Python tells a file from an earlier one by second and size. So this file has its own size:
# -------------
