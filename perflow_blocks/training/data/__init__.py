"""Data sets for the trainer."""
