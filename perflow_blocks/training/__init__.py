"""Distilling accelerators: the windowed trainer, its data and its output."""
