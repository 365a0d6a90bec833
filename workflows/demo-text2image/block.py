"""What diffusers runs when this directory is loaded as a modular pipeline; needs the package perflow_blocks."""

from perflow_blocks.demo.blocks import PeRFlowDemoBlocks

__all__ = ["PeRFlowDemoBlocks"]
