"""Images no camera makes: every mode, every format, headers that lie, bombs."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from e5v_jax.data.images import FORMATS

SIDES = (0x0123, 0x0135)  # (width, height) that :func:`lying` finds again in a header


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


# --- modes


def in_every_mode(height: int = 60, width: int = 45) -> Iterator[tuple[str, Image.Image]]:
    """A noisy image in each mode of Pillow that becomes RGB, with and without transparency."""
    image, rng = noise(height, width), np.random.default_rng(2)
    alpha = Image.fromarray(np.tile(np.arange(width, dtype=np.uint8) * 5, (height, 1)))
    for mode in ("RGB", "1", "L", "CMYK", "YCbCr", "LAB", "HSV", "I", "RGBX"):
        yield mode, image.convert(mode)
    wide = rng.integers(0, 1 << 16, (height, width), dtype=np.uint16)
    yield "I;16", Image.fromarray(wide)
    yield "I;16B", Image.frombytes("I;16B", (width, height), wide.astype(">u2").tobytes())
    grey = rng.uniform(-50, 300, (height, width)).astype(np.float32)
    yield "F", Image.fromarray(grey)
    palette = image.quantize(50)
    yield "P", palette
    for mode, base in (("RGBA", image), ("LA", image.convert("L")), ("PA", palette)):
        seen = base.copy()
        seen.putalpha(alpha)
        assert seen.mode == mode
        yield mode, seen
    yield "RGBa", image.convert("RGBA").convert("RGBa")
    for name, base, colour in (
        ("P, one entry transparent", palette, 3),
        ("P, half of the entries transparent", palette, bytes([0, 255, 128] * 16)),
        ("1, white transparent", image.convert("1"), 255),
        ("L, one grey transparent", image.convert("L"), image.convert("L").getpixel((0, 0))),
        ("RGB, one colour transparent", image, image.getpixel((0, 0))),
    ):
        seen = base.copy()
        seen.info["transparency"] = colour
        yield name, seen


# --- files


def every_file(image: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    """(name, format, bytes) of an RGB image in every format and its variants."""
    other = image.transpose(Image.Transpose.ROTATE_180)
    for fmt in ("PNG", "GIF", "WEBP", "TIFF", "AVIF"):
        yield "animated", fmt, encode(image, fmt, save_all=True, append_images=[other])
    for fmt in FORMATS:
        yield "plain", fmt, encode(image, fmt)
    yield "progressive", "JPEG", encode(image, "JPEG", progressive=True)
    yield "CMYK", "JPEG", encode(image.convert("CMYK"), "JPEG")
    yield "MPO", "JPEG", encode(image, "MPO", save_all=True, append_images=[other])
    yield "interlaced palette", "PNG", encode(image.quantize(9), "PNG", transparency=bytes(4))
    yield "one colour transparent", "PNG", encode(image, "PNG", transparency=image.getpixel((0, 0)))
    yield "16 bits", "PNG", encode(image.convert("I;16"), "PNG")
    yield "lossless", "WEBP", encode(image.convert("RGBA"), "WEBP", lossless=True)
    image = image.copy()  # a JPEG leaves its settings in the image, which TIFF stumbles over
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        yield compression, "TIFF", encode(image, "TIFF", compression=compression)
    yield "float", "TIFF", encode(image.convert("F"), "TIFF")
    yield "8 bits", "BMP", encode(image.quantize(9), "BMP")
    yield "grey", "PPM", encode(image.convert("L"), "PPM")
    yield "bits", "PPM", encode(image.convert("1"), "PPM")


def lying(fmt: str, width: int, height: int) -> bytes:
    """A small file whose header claims ``width`` x ``height`` pixels."""
    image = Image.new("RGB", SIDES, "red")
    if fmt == "WEBP":  # the canvas of an animation, larger than its frames
        frames = [image.rotate(90)]
        data = bytearray(encode(image, fmt, save_all=True, append_images=frames, lossless=True))
        assert data[12:16] == b"VP8X"
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return bytes(data)
    data = bytearray(encode(image, fmt))
    big, little, text = (">I", "<I", "%d")
    kind = {"JPEG": ">H", "GIF": "<H", "TIFF": little, "BMP": little, "PPM": text}.get(fmt, big)
    for old, new in zip(SIDES, (width, height), strict=True):
        before, after = (
            (kind % side).encode() if kind == text else struct.pack(kind, side)
            for side in (old, new)
        )
        assert before in data
        data = data.replace(before, after)
    if fmt == "PNG":
        start = data.index(b"IHDR")
        data[start + 17 : start + 21] = struct.pack(">I", zlib.crc32(data[start : start + 17]))
    return bytes(data)


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (10, 10)) -> bytes:
    """A black PNG of ``size`` with more chunks in front of its pixels."""
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + 3 * size[0]) * size[1]))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def tiff(tags: dict[int, int], data: bytes) -> bytes:
    """A grey TIFF of 10 x 10 pixels with other or more tags; ``data`` is at byte 300."""
    found = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, found[tag]) for tag in sorted(found))
    head = b"II*\0" + struct.pack("<IH", 8, len(found)) + entries + bytes(4)
    return head.ljust(300, b"\0") + data


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would fill the memory if their header, or what is in it, were believed."""
    zeros = zlib.compress(bytes(10**8))  # 97 KB
    yield "PNG, zTXt", png((b"zTXt", b"k\0\0" + zeros))
    yield "PNG, iTXt", png((b"iTXt", b"k\0\1\0\0\0" + zeros))
    yield "PNG, iCCP", png((b"iCCP", b"k\0\0" + zeros))
    texts = [(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(10**6))) for i in range(100)]
    yield "PNG, many zTXt", png(*texts)
    gif = bytearray(encode(Image.new("RGB", (20, 20)), "GIF"))
    start = gif.index(b",\0\0\0\0")
    gif[start + 5 : start + 9] = struct.pack("<HH", 60_000, 60_000)
    yield "GIF, a frame larger than the canvas", bytes(gif)
    strip = {273: 300, 278: 10, 279: len(zeros)}
    yield "TIFF, size", tiff({256: 60_000, 257: 60_000, **strip}, zeros)
    for side in (10_000, 30_000, 65_520):  # multiples of 16, as tiles are
        tile = {322: side, 323: side, 324: 300, 325: len(zeros)}
        yield f"TIFF, tiles of {side}", tiff(tile, zeros)
    bmp = bytearray(encode(Image.new("P", SIDES), "BMP"))
    bmp[30] = 1  # compression: RLE, which has no data here
    yield "BMP, RLE", bytes(bmp)
    yield "PPM, a number of a million digits", b"P2 " + b"1" * 10**6
    yield "PPM, few digits", b"P2 9000 9000 255\n" + b"1 " * 1000
