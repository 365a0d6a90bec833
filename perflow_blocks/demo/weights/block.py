"""What diffusers runs when this directory is loaded as a modular pipeline; needs the package perflow_blocks."""

from perflow_blocks.blocks.auto_blocks import PeRFlowSDXLAutoBlocks

__all__ = ["PeRFlowSDXLAutoBlocks"]
