"""Attention strategies for UNet and ControlNet: which kernels there are, what each needs, and where it is used."""
