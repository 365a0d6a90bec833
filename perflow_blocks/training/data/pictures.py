"""Opening pictures of all kinds, bad ones included, as upright RGB."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .batch import Size
from .records import StoredPicture

NO_CAPTION = "no caption"
MISSING = "missing file"
UNREADABLE = "unreadable"  # no picture, or of a format that Pillow does not know
TRUNCATED = "truncated"  # begins well, and then the data ends or is damaged
TOO_SMALL = "too small"
TOO_LARGE = "too large"  # Pillow's limit against decompression bombs
ODD_MODE = "unknown range of values"  # 32-bit pictures with more than 16 bits in use

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Names of files that are taken for pictures, in lower case."""

_TURNED = range(5, 9)  # EXIF orientations that swap height and width
_WHITE = (255, 255, 255, 255)


class BadPicture(Exception):
    """A picture that is left out; `reason` is one of the constants of this module."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def picture_size(stored: StoredPicture) -> Size:
    """(height, width) of a picture as it is shown, from its header.

    Raises:
        BadPicture: it is missing, unreadable or too large.
    """
    image = _open(stored)
    try:
        # Looking for EXIF data decodes a whole PNG unless it has it in front.
        exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in _TURNED
    except Exception:  # damaged EXIF data is no reason to leave a picture out; decoding ignores it as well
        turned = False
    finally:
        if image is not stored:
            image.close()
    return (image.width, image.height) if turned else (image.height, image.width)


def open_picture(stored: StoredPicture) -> Image.Image:
    """A picture as RGB, turned as its EXIF data says; transparent parts become white.

    Raises:
        BadPicture: it is missing, unreadable, truncated, too large, or of no known range of values.
    """
    image = _open(stored)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # which one depends on the format and its decoder
        raise BadPicture(TRUNCATED) from error
    return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel: 16-bit greys are scaled rather than clipped, transparency is laid on white.

    Raises:
        BadPicture: a 32-bit picture with values outside 0 to 65535 (whole numbers) or 0 to 1 (floats).
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _open(stored: StoredPicture) -> Image.Image:
    if isinstance(stored, Image.Image):
        return stored
    try:
        return Image.open(BytesIO(stored) if isinstance(stored, bytes) else Path(stored))
    except FileNotFoundError as error:
        raise BadPicture(MISSING) from error
    except Image.DecompressionBombError as error:
        raise BadPicture(TOO_LARGE) from error
    except MemoryError:
        raise
    except Exception as error:  # plugins raise what they like at files that are none
        raise BadPicture(UNREADABLE) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data: the picture as it is stored
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    largest = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0.0 and values.max() <= largest):
        raise BadPicture(ODD_MODE)
    return Image.fromarray(np.round(values * (255.0 / largest)).astype(np.uint8))
