"""Photographs the right way up, whole and in small."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from e5v_jax.data.images import FORMATS, ImageError, image_name, image_size, load_image

_SIDE = 400  # most pixels of a thumbnail's longer side: the grid's, on a screen of twice as many
_QUALITY = 82


@dataclass(frozen=True)
class Thumbnail:
    """A photograph in small."""

    width: int
    height: int
    jpeg: bytes


def upright(source: Path | bytes) -> Path | bytes | Image.Image:
    """Turn a photograph as its EXIF orientation says; one that is upright stays as it is.

    Cameras write what their sensor saw and how they were held. E5V.encode reads the pixels alone,
    as the authors of its models do. Raises ImageError: as e5v_jax.data.images.load_image.
    """
    image_size(source)  # refuses what must not be opened
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(opened, formats=list(FORMATS)) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1):
                return source
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise almost anything on broken data
        raise _broken(source, error) from error


def make_thumbnail(source: Path | bytes) -> Thumbnail:
    """Make a JPEG of at most 400 pixels a side, upright. Raises ImageError: as :func:`upright`."""
    image_size(source)
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(opened, formats=list(FORMATS)) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG's decoder can skip most of it
            small = ImageOps.exif_transpose(image)
            small.thumbnail((_SIDE, _SIDE))
            small = load_image(small)
            file = io.BytesIO()
            small.save(file, "JPEG", quality=_QUALITY)
    except Exception as error:
        raise _broken(source, error) from error
    return Thumbnail(small.width, small.height, file.getvalue())


def _broken(source: Path | bytes, error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = " ".join(text.split()) or type(error).__name__
    return ImageError(f"{image_name(source)}: cannot be read as an image: {reason}")
