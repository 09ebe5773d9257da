"""Images as users give them, read with Pillow: bounded in size, refused in one line."""

import io
import math
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Literal, TypeVar

from PIL import Image, UnidentifiedImageError

# Larger images are refused by their header. Pillow warns from the same size on and refuses twice
# as much, but its limit is a global that any library may change or switch off.
MAX_IMAGE_PIXELS = 89_478_485

# What photographs come in, as Pillow names it, with the suffixes that a folder is searched for. Of
# each the header alone tells the size, and an image at the limit takes 0.7 to 1.8 GB. The rest of
# what Pillow opens is left out: icons are decoded to be opened, EPS starts a program, FITS was a
# bomb before Pillow 12.2, JPEG 2000 takes 3.2 GB at the limit, and each decoder more is one more
# that a stranger's file can attack.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # MPO: more pictures behind the first
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
_TILE_TAGS = (322, 323)  # TIFF's TileWidth and TileLength

# Of a caller's image, whose pixels Pillow reads when they are first asked for: two inputs may share
# one, and threads that read it at once fail, or mix its bytes.
_ONE_AT_A_TIME = Lock()

Size = tuple[int, int]  # (height, width)
T = TypeVar("T")


class ImageError(ValueError):
    """An image that cannot be used; the message is one line and names the image."""

    too_large = False
    """It may be whole, and has more pixels than allowed."""


class _TooLarge(ImageError):
    too_large = True


def load_image(
    source: str | Path | bytes | Image.Image,
    resize: Size | None = None,
    *,
    transparency: Literal["drop", "white"] = "drop",
) -> Image.Image:
    """Read a file, its bytes or a Pillow image (left unchanged) as RGB.

    ``resize`` makes it so large before that conversion, by Pillow's own filter for its mode.

    Other modes go through ``convert("RGB")``, as in the code of E5-V and the transformers that it
    pins (4.41.2; so do all of transformers 4): transparency is dropped, be it a band, a palette's
    or one colour's (PNG's tRNS), and what is seen is the colour under it. transformers 5 blends it
    with white, which moves an embedding by some hundredths from those E5-V was published with. With
    ``transparency`` "white", an RGBA image is pasted on white, as qwen-vl-utils 0.0.14 does it. No
    EXIF rotation is applied either. Of an animation, the first frame.

    Raises:
        ImageError: missing file, a pipe or the like, none of ``FORMATS``, broken or truncated data,
            no pixels, more than ``MAX_IMAGE_PIXELS``, or a URL. The header tells the size, so that
            nothing is decoded for it.
        TypeError: ``source`` is none of these.
    """
    if isinstance(source, Image.Image):
        with _ONE_AT_A_TIME:
            _open(source, lambda image: image.load())
    return _open(source, partial(_to_rgb, resize=resize, transparency=transparency))


def read_image(
    source: str | Path | bytes, *, formats: Sequence[str], max_pixels: int
) -> Image.Image:
    """Decode an image as it is in its file, for a program that has its own limits.

    The first frame, with the file's mode, palette and transparency: :func:`load_image` makes of it
    what it makes of the file. ``formats`` are some of ``FORMATS``; ``max_pixels`` counts where it
    is lower than ``MAX_IMAGE_PIXELS``. The same errors.
    """
    return _open(source, lambda image: image.copy(), formats, max_pixels)


def image_size(source: str | Path | bytes | Image.Image) -> Size:
    """Read (height, width) that :func:`load_image` will find from the header; the same errors."""
    return _open(source, lambda image: (image.height, image.width))


def _to_rgb(image: Image.Image, resize: Size | None, transparency: str) -> Image.Image:
    if resize is not None:
        image = image.resize(resize[::-1])
    if transparency == "white" and image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # the caller's is left unchanged
        del image.info["transparency"]  # else Pillow warns that it is dropped
    return image.convert("RGB")


def _open(
    source: str | Path | bytes | Image.Image,
    read: Callable[[Image.Image], T],
    formats: Sequence[str] = tuple(FORMATS),
    max_pixels: int | None = None,
) -> T:
    if not isinstance(source, str | Path | bytes | Image.Image):
        kind = type(source).__name__
        raise TypeError(f"an image must be a path, bytes or a PIL image, not {kind}")
    name = image_name(source)
    if isinstance(source, str | Path) and re.match(r"https?:/", str(source), re.IGNORECASE):
        raise ImageError(f"{name}: URLs are not fetched; download the image and give its path")
    try:
        # opening a pipe would wait for its other end
        if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):
            raise ImageError(f"{name}: no file, but a folder, a pipe or the like")
        with (
            nullcontext(source)
            if isinstance(source, Image.Image)
            else Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source, formats=list(formats)
            )
        ) as image:
            width, height = image.size
            size = f"{width}x{height} pixels"
            if width < 1 or height < 1:
                raise ImageError(f"{name}: {size}, an image needs at least one")
            # Above its own limit Pillow only warns, so a lower one of the program counts here too.
            limits = (MAX_IMAGE_PIXELS, Image.MAX_IMAGE_PIXELS, max_pixels)
            limit = min(limit for limit in limits if limit)
            if width * height > limit:
                raise _TooLarge(f"{name}: {size}, more than the {limit} allowed; shrink it first")
            # A tile is decoded whole, be it larger than the image.
            if math.prod(getattr(image, "tag_v2", {}).get(tag, 1) for tag in _TILE_TAGS) > limit:
                raise _TooLarge(f"{name}: its tiles have more than the {limit} pixels allowed")
            return read(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise ImageError(f"{name}: not an image in a format that is read: {known}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _TooLarge(f"{name}: too large to decode: {_one_line(error)}") from error
    except Exception as error:  # Pillow's decoders raise almost anything on broken data
        raise ImageError(f"{name}: cannot be read as an image: {_one_line(error)}") from error


def image_name(source: str | Path | bytes | Image.Image) -> str:
    """Name an image in a message: on one line, of bounded length."""
    if isinstance(source, bytes):
        return f"image bytes ({len(source)} bytes)"
    if isinstance(source, Image.Image):
        return f"PIL image ({source.mode} {source.width}x{source.height})"
    name = str(source)
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 300 else f"{name[:300]}..."  # a str that was data, not a path


def _one_line(error: Exception) -> str:
    # strerror leaves out the file name, which the message already has
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
