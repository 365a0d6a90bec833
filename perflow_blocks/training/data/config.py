"""Names that the files beside this one use."""

from ..config import DEMO_IMAGE_SIZE as DEMO_PICTURE_SIZE
from ..config import DataConfig

CAPTION_NAMES = ("text", "caption", "prompt")

__all__ = ["CAPTION_NAMES", "DEMO_PICTURE_SIZE", "DataConfig", "value_problems"]


def value_problems(config: DataConfig) -> list[str]:
    return []
