"""The accelerator as a difference of weights: files, merging, extraction, and its form as a LoRA."""
