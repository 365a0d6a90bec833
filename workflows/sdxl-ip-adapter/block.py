"""What diffusers runs when this directory is loaded as a modular pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.workflows import PeRFlowSDXLIPAdapterBlocks

__all__ = ["PeRFlowSDXLIPAdapterBlocks"]
