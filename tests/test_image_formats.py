"""Every format that is read, at the limit of pixels and over it; bombs; the rest is refused."""

import io
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_images import bombs, encode, every_file, in_every_mode, lying, noise, png, tiff
from PIL import Image
from test_images import pinpoints, reference_tiles

from e5v_jax.data import images
from e5v_jax.data.images import FORMATS, MAX_IMAGE_PIXELS, ImageError, image_size, load_image
from e5v_jax.encode.files import IMAGE_SUFFIXES
from e5v_jax.families.llava_next.tiling import tile_image

MODES = dict(in_every_mode())
FILES = {f"{fmt}, {name}": (fmt, data) for name, fmt, data in every_file(noise(40, 30))}
BOMBS = list(bombs())
Peak = Callable[[], float]


@pytest.fixture
def peak() -> Peak:
    """MB that the process has taken since the test began, at most."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("the kernel does not tell the peak of a part of a program")

    def read(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    reset.write_text("5")  # the peak is what is taken now
    start = read("VmRSS")
    return lambda: read("VmHWM") - start


def pinned(image: Image.Image) -> Image.Image:
    """``convert_to_rgb`` of transformers 4.41.2, the one E5-V pins, without what it says of RGB."""
    return Image.fromarray(np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("error")  # Pillow's about palettes too: the command prints one line
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_what_the_reference_sees(mode: str) -> None:
    image = MODES[mode]
    info = dict(image.info)
    ours = load_image(image)
    assert ours.mode == "RGB" and image.info == info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        expected = pinned(image)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    tiles = tile_image(ours, image_size=28, grid_pinpoints=pinpoints(28)).tiles
    np.testing.assert_array_equal(tiles, reference_tiles(expected, 28), strict=True)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FILES)
def test_every_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, data = FILES[name]
    path = tmp_path / f"image{FORMATS[fmt][0]}"
    path.write_bytes(data)
    with Image.open(path) as image:
        expected = np.asarray(pinned(image))
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 40 * 30)
    for source in (path, data):
        assert image_size(source) == (40, 30)
        np.testing.assert_array_equal(np.asarray(load_image(source)), expected)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    with pytest.raises(ImageError, match="30x40 pixels, more than the 1199 allowed; shrink it"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fmt", FORMATS)
def test_just_over_the_limit_is_refused_by_the_header(
    fmt: str, monkeypatch: pytest.MonkeyPatch, peak: Peak
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    width, height = 9466, 9453  # 1613 pixels over, and no side is a multiple of anything
    data, start = lying(fmt, width, height), time.perf_counter()
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=f"{width}x{height} pixels, more than the 89478485"):
            read(data)
    assert time.perf_counter() - start < 0.5
    assert peak() < 16


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize(("name", "data"), BOMBS, ids=dict(BOMBS))
def test_bombs(name: str, data: bytes, peak: Peak) -> None:
    start = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        load_image(data)
    assert str(caught.value).isprintable()
    assert time.perf_counter() - start < 2
    assert peak() < 340  # what the largest image takes that is allowed, and this is none


def test_what_is_no_bomb_is_read() -> None:
    short = zlib.compress(bytes(1000))
    assert load_image(png((b"zTXt", b"k\0\0" + short), (b"iCCP", b"k\0\0" + short))).size == (
        10,
        10,
    )
    tile = {322: 16, 323: 16, 324: 300, 325: len(short)}
    assert load_image(tiff(tile, short)).size == (10, 10)
    frames = [noise(20, 20, seed) for seed in range(60)]
    many = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(many).size == (20, 20)


@pytest.mark.parametrize(
    "fmt", ["ICO", "ICNS", "EPS", "JPEG2000", "PCX", "TGA", "DDS", "SGI", "PDF"]
)
def test_other_formats_are_refused_by_name(fmt: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(noise(64, 64), fmt))
    with pytest.raises(ImageError) as caught:
        load_image(path)
    known = "JPEG, PNG, WEBP, GIF, TIFF, BMP, PPM, AVIF"
    assert str(caught.value) == f"{path}: not an image in a format that is read: {known}"


def test_a_folder_is_searched_for_every_format() -> None:
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in IMAGE_SUFFIXES} == {*FORMATS, "MPO"}


@pytest.mark.slow  # 20 s and 2 GB
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_largest_image(fmt: str, peak: Peak) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5)
    image = Image.new("RGB", (side, side), "red")
    data = io.BytesIO()
    image.save(data, fmt, **({"speed": 10} if fmt == "AVIF" else {}))
    del image
    start = time.perf_counter()
    assert load_image(data.getvalue()).size == (side, side)
    print(f"{fmt}: {time.perf_counter() - start:.1f} s, {peak():.0f} MB")
    assert peak() < 2000
