"""Data sets for the trainer: captioned pictures, or prompts alone, as batches with an exact position."""

from .batch import BatchSource, TrainingBatch
from .config import DataConfig
from .opening import open_dataset, problems

__all__ = ["BatchSource", "DataConfig", "TrainingBatch", "open_dataset", "problems"]
