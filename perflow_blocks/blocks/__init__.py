"""Leaf blocks, the denoising loops and the assembled presets for Modular Diffusers."""
