"""PeRFlow in ComfyUI: 4 to 8 steps with SDXL, SD 1.5 and SD 2.1."""

from .nodes import PeRFlowSampler, PeRFlowSigmas

NODE_CLASS_MAPPINGS = {"PeRFlowSigmas": PeRFlowSigmas, "PeRFlowSampler": PeRFlowSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"PeRFlowSigmas": "PeRFlow sigmas", "PeRFlowSampler": "PeRFlow sampler"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
