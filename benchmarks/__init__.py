"""Measurements, as ratios of medians taken side by side in one run."""
