"""Tiling and token order against transformers' LLaVA-NeXT; images that must be refused."""

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from e5v_jax.data import images
from e5v_jax.data.images import ImageError, load_image
from e5v_jax.families.llava_next.tiling import (
    NEWLINE,
    image_token_index,
    num_image_tokens,
    select_best_resolution,
    tile_image,
)
from e5v_jax.nn.vision_config import IMAGE_MEAN, IMAGE_STD

PATCH = 14
IMAGE_SCALE = 1 / 255


def pinpoints(s: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's grid for tiles of side ``s``."""
    return (s, 2 * s), (2 * s, s), (2 * s, 2 * s), (3 * s, s), (s, 3 * s)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_processor(s: int) -> LlavaNextImageProcessorPil:
    grid = [list(p) for p in pinpoints(s)]
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": s},
        crop_size={"height": s, "width": s},
        image_grid_pinpoints=grid,
    )


def reference_tiles(image: Image.Image, s: int) -> np.ndarray:
    """uint8 [T, S, S, 3]: transformers' processor stopped before it rescales."""
    out = reference_processor(s)(image, do_rescale=False, do_normalize=False)
    return np.asarray(out["pixel_values"][0]).transpose(0, 2, 3, 1)


def assert_same_tiles(image: Image.Image, s: int) -> None:
    ours = tile_image(load_image(image), image_size=s, grid_pinpoints=pinpoints(s))
    assert ours.tiles.dtype == np.uint8
    assert ours.original_size == (image.height, image.width)
    np.testing.assert_array_equal(ours.tiles, reference_tiles(image, s), strict=True)


# --- tiles ---------------------------------------------------------------------------------------

SIZES = [  # (height, width)
    (1, 1), (1, 2), (2, 1), (3, 3), (1, 5), (7, 1), (28, 28), (27, 29), (56, 28), (56, 57),
    (84, 28), (28, 84), (85, 29), (55, 111), (640, 480), (480, 640), (500, 375), (333, 500),
    (512, 512), (50, 8000), (8000, 50), (1, 8000), (8000, 1), (3, 4001),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_small_tiles_equal_transformers(size: tuple[int, int]) -> None:
    assert_same_tiles(noise(*size), 28)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (200, 200), (50, 8000), (1, 8000)])
def test_tiles_of_336_equal_transformers(size: tuple[int, int]) -> None:
    assert_same_tiles(noise(*size), 336)


def test_random_sizes_equal_transformers() -> None:
    rng = np.random.default_rng(1)
    shapes = set()
    sizes = np.exp(rng.uniform(0, np.log(300), (150, 2))).astype(int)
    for seed, (h, w) in enumerate(sizes.tolist()):
        image = noise(h, w, seed)
        assert_same_tiles(image, 28)
        shapes.add(select_best_resolution((h, w), pinpoints(28)))
    assert shapes == set(pinpoints(28))  # every grid was met


def test_photographs_equal_transformers(shared: Path) -> None:
    paths = sorted((shared / "data" / "flickr8k" / "images").glob("*.jpg"))[::12]
    if not paths:
        pytest.skip("no photographs in the data folder")
    aspects = set()
    for path in paths:
        with Image.open(path) as image:
            aspects.add(image.width > image.height)
            expected = reference_tiles(image, 336)
        for source in (path, str(path), path.read_bytes()):
            tiled = tile_image(load_image(source), image_size=336, grid_pinpoints=pinpoints(336))
            np.testing.assert_array_equal(tiled.tiles, expected, strict=True)
    assert aspects == {True, False}  # landscape and portrait


def test_rescaling_and_normalising_equal_transformers() -> None:
    image = noise(40, 90)
    tiles = tile_image(image, image_size=28, grid_pinpoints=pinpoints(28)).tiles
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    ours = (tiles * np.float32(IMAGE_SCALE) - mean) / std
    theirs = np.asarray(reference_processor(28)(image)["pixel_values"][0]).transpose(0, 2, 3, 1)
    assert theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-6
    assert np.abs((tiles / np.float32(255) - mean) / std - theirs).max() <= 1e-6


def test_tiling_refuses_other_modes_and_odd_sizes() -> None:
    with pytest.raises(ValueError, match="RGB image, got L"):
        tile_image(Image.new("L", (5, 5)), image_size=28, grid_pinpoints=pinpoints(28))
    with pytest.raises(ValueError, match=r"\(28, 57\).*multiples of image_size 28"):
        tile_image(noise(5, 5), image_size=28, grid_pinpoints=[(28, 56), (28, 57)])
    with pytest.raises(ValueError, match="image_grid_pinpoints is empty"):
        tile_image(noise(5, 5), image_size=28, grid_pinpoints=[])
    with pytest.raises(ImageError, match="5x0 pixels"):
        tile_image(Image.new("RGB", (5, 0)), image_size=28, grid_pinpoints=pinpoints(28))


# --- modes ---------------------------------------------------------------------------------------


def opaque(mode: str) -> Image.Image:
    image = noise(60, 45)
    if mode == "I;16":
        grey = np.random.default_rng(2).integers(0, 1 << 16, (60, 45), dtype=np.uint16)
        return Image.fromarray(grey)
    if mode == "F":
        return Image.fromarray(np.linspace(-50, 300, 2700, dtype=np.float32).reshape(60, 45))
    if mode == "P":
        return image.quantize(50)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_opaque_modes_equal_transformers(mode: str) -> None:
    image = opaque(mode)
    assert image.mode == mode
    assert load_image(image).mode == "RGB"
    assert_same_tiles(image, 28)


def test_files_in_other_modes_equal_transformers(tmp_path: Path) -> None:
    for mode, suffix in (("I;16", "png"), ("CMYK", "jpg"), ("P", "gif"), ("1", "tif")):
        path = tmp_path / f"image.{suffix}"
        opaque(mode).save(path)
        with Image.open(path) as image:
            assert image.mode == mode
            expected = reference_tiles(image, 28)
        tiled = tile_image(load_image(path), image_size=28, grid_pinpoints=pinpoints(28))
        np.testing.assert_array_equal(tiled.tiles, expected, strict=True)


def transparent(mode: str) -> Image.Image:
    image = noise(60, 45)
    alpha = Image.fromarray(np.tile(np.arange(45, dtype=np.uint8) * 5, (60, 1)))
    if mode == "P":  # every other palette entry fully transparent
        image = image.quantize(50)
        image.info["transparency"] = bytes([0, 255] * 25)
        return image
    base = image.convert({"LA": "L", "RGBA": "RGB", "PA": "P"}[mode])
    base = base.convert(mode)
    base.putalpha(alpha)
    return base


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P"])
def test_transparency_is_dropped_not_blended(mode: str) -> None:
    """As transformers 4 and the published embeddings have it; transformers 5 blends with white."""
    image = transparent(mode)
    assert image.mode == mode
    ours = load_image(image)
    colours = np.asarray(image.convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(np.asarray(ours), colours)
    assert_same_tiles(Image.fromarray(np.asarray(ours)), 28)


# --- load_image: what is read --------------------------------------------------------------------


def encode(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to display"
    assert load_image(encode(noise(40, 60), "JPEG", exif=exif)).size == (60, 40)


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(fmt: str) -> None:
    red, blue = (Image.new("RGB", (20, 10), c) for c in ("red", "blue"))
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(red, fmt, save_all=True, append_images=[blue], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(red))


def test_a_pil_image_is_left_unchanged() -> None:
    image = noise(6, 5)
    loaded = load_image(image)
    loaded.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(6, 5)))


def test_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Image.open

    def spy(*args: Any, **kwargs: Any) -> Any:
        opened.append(original(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(Image, "open", spy)
    path = tmp_path / "a.gif"
    noise(6, 5).save(path, save_all=True, append_images=[noise(6, 5, 1)])  # not read to the end
    load_image(path)
    with pytest.raises(ValueError, match="closed"):
        opened[0].seek(1)  # an animation's file stays open for this unless it is closed


# --- load_image: what is refused -----------------------------------------------------------------


def refused(source: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500, "one readable line"
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixel data to match."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def test_missing_file_folder_and_url(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    assert refused(path) == refused(str(path)) == f"{path}: no such file"
    assert str(tmp_path) in refused(tmp_path)
    for url in ("http://example.org/a.png", "HTTPS://example.org/a.png"):
        assert refused(url) == f"{url}: URLs are not fetched; download the image and give its path"
    assert "URLs are not fetched" in refused(Path("https://example.org/a.png"))


@pytest.mark.parametrize("garbage", [b"", b"hello", bytes(5000), b"\xff\xd8\xff", b"\x89PNG\r\n"])
def test_garbage(garbage: bytes, tmp_path: Path) -> None:
    assert refused(garbage).startswith(f"image bytes ({len(garbage)} bytes): ")
    path = tmp_path / "photo.jpg"
    path.write_bytes(garbage)
    assert refused(path).startswith(f"{path}: ")


FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated(fmt: str, tmp_path: Path) -> None:
    data = encode(noise(50, 40), fmt)
    for keep in (0.1, 0.5, 0.9):
        path = tmp_path / "cut.img"
        path.write_bytes(data[: int(len(data) * keep)])
        assert refused(path).startswith(f"{path}: ")


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("fmt", FORMATS)
def test_random_damage_raises_image_error_or_nothing(fmt: str) -> None:
    rng = np.random.default_rng(3)
    data = np.frombuffer(encode(noise(30, 20), fmt), np.uint8)
    failures = 0
    for _ in range(60):
        broken = data.copy()
        broken[rng.integers(0, min(len(data), 200), 6)] = rng.integers(0, 256, 6)
        try:
            load_image(broken.tobytes())
        except ImageError as error:
            failures += 1
            assert str(error).isprintable()
    assert failures


def test_names_stay_one_short_line() -> None:
    assert "a\\nb.png" in refused("a\nb.png")
    assert refused("A" * 100_000)  # base64 data handed over as a path
    assert refused("a\0b")


def test_messages_stay_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken\n  twice")

    monkeypatch.setattr(Image, "open", fail)
    assert refused(b"a") == "image bytes (1 bytes): cannot be read as an image: broken twice"


def test_other_types_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="not ndarray"):
        load_image(np.zeros((2, 2, 3), np.uint8))  # type: ignore[arg-type]  # what is tested


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when Pillow decodes pixels."""

    def load(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    bomb, huge = png_header(10_000, 10_000), png_header(60_000, 60_000)
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    assert refused(path) == (
        f"{path}: 10000x10000 pixels, more than the 89478485 allowed; shrink it first"
    )
    assert refused(bomb).startswith(f"image bytes ({len(bomb)} bytes): 10000x10000 pixels")
    assert "too large to decode" in refused(huge)  # Pillow's error comes first
    assert before == Image.MAX_IMAGE_PIXELS  # Pillow's own limit is left alone
    with Image.open(io.BytesIO(bomb)) as image:  # opened elsewhere, not decoded yet
        assert refused(image).startswith("PIL image (RGB 10000x10000): 10000x10000 pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # switched off by someone else
    assert "60000x60000 pixels, more than the 89478485" in refused(huge)


@pytest.mark.usefixtures("no_decoding")
def test_pillows_warning_is_an_image_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # stricter than ours
    data = png_header(40, 30)
    with pytest.warns(Image.DecompressionBombWarning):
        assert "40x30 pixels, more than the 1000 allowed" in refused(data)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_as_an_exception() -> None:
    assert "too large to decode" in refused(png_header(10_000, 10_000))


def test_the_limit_is_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 30)
    assert load_image(encode(noise(5, 6), "PNG")).size == (6, 5)
    assert "1x31 pixels" in refused(encode(noise(31, 1), "PNG"))


def test_no_pixels() -> None:
    assert refused(Image.new("RGB", (0, 4))) == (
        "PIL image (RGB 0x4): 0x4 pixels, an image needs at least one"
    )
    assert refused(png_header(0, 4)).startswith("image bytes")


# --- tokens --------------------------------------------------------------------------------------

GEOMETRIES = [(336, pinpoints(336)), (28, pinpoints(28)), (42, pinpoints(42))]  # 42: odd side
GEOMETRIES.append((41, pinpoints(41)))  # 13 pixels of a side belong to no patch
# A grid of other shapes, unsorted, with two of equal area.
GEOMETRIES.append((28, ((84, 84), (28, 28), (56, 112), (112, 56), (28, 112), (140, 28))))


def sweep(count: int, seed: int) -> list[tuple[int, int]]:
    """Sizes (height, width): known hard ones, near-exact aspects, small, and log-uniform."""
    rng = np.random.default_rng(seed)
    sizes = [(h, w) for h in range(1, 25) for w in range(1, 25)]
    # Unpadded sizes that are whole numbers, but not as floats without the reference's rounding.
    for a, b in ((47, 47), (49, 98), (55, 88), (55, 176), (47, 376), (55, 264), (98, 147)):
        sizes += [(a, b), (b, a), (2 * a, 2 * b), (2 * b, 2 * a)]
    sizes += [*SIZES, (1, 10**6), (10**6, 1), (9999, 10**4), (3999, 4001)]
    for h, w in pinpoints(336):
        for scale in (0.25, 0.5, 1, 1.5, 2, 3.1):
            for dh, dw in np.ndindex(3, 3):
                sizes.append((int(h * scale) + int(dh) - 1, int(w * scale) + int(dw) - 1))
    random = np.exp(rng.uniform(0, np.log(8000), (count, 2))).astype(int)
    return sizes + [(int(h), int(w)) for h, w in np.maximum(random, 1)]


def reference_counter(s: int, grid: tuple[tuple[int, int], ...]) -> Callable[[int, int], int]:
    """transformers' count of image tokens, without the tokenizer its processor wants."""
    processor = object.__new__(LlavaNextProcessor)
    processor.patch_size = PATCH
    processor.num_additional_image_tokens = 1  # CLS, dropped again below
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(p) for p in grid])
    return lambda h, w: processor._get_number_of_features(h, w, s, s) - 1


@pytest.mark.parametrize(("s", "grid"), GEOMETRIES)
def test_token_counts_equal_transformers(s: int, grid: tuple[tuple[int, int], ...]) -> None:
    expected = reference_counter(s, grid)
    sizes = sweep(5000, seed=s)
    assert len(sizes) > 5500 and {(1, 1), (8000, 50), (50, 8000)} <= set(sizes)
    wrong = [
        size
        for size in sizes
        if num_image_tokens(size, grid_pinpoints=grid, image_size=s, patch_size=PATCH)
        != expected(*size)
    ]
    assert not wrong


@pytest.mark.parametrize(("s", "grid"), GEOMETRIES)
def test_token_order_equals_transformers(s: int, grid: tuple[tuple[int, int], ...]) -> None:
    """Pack the numbers 0, 1, 2 ... where the reference packs features."""
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=s, patch_size=PATCH),
        image_grid_pinpoints=[list(p) for p in grid],
    )
    model: Any = SimpleNamespace(config=config)  # all that the packing needs of a model
    pack: Any = LlavaNextModel.pack_image_features
    per_tile = (s // PATCH) ** 2
    sizes = [*SIZES, *sweep(200, seed=s + 1)[::3]]
    assert len(sizes) > 300
    for size in sizes:
        height, width = select_best_resolution(size, grid)
        num_tiles = 1 + (height // s) * (width // s)
        features = torch.arange(num_tiles * per_tile).reshape(num_tiles, per_tile, 1)
        newline = torch.tensor([NEWLINE])
        packed, _ = pack(model, [features], [size], "default", image_newline=newline)
        ours = image_token_index(size, grid_pinpoints=grid, image_size=s, patch_size=PATCH)
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, packed[0][:, 0].numpy(), err_msg=str(size))
        count = num_image_tokens(size, grid_pinpoints=grid, image_size=s, patch_size=PATCH)
        assert count == len(ours)


@pytest.mark.parametrize(
    ("size", "count"),
    [((480, 640), 2340), ((512, 512), 2928), ((8000, 1), 600), ((1, 8000), 576)],
)
def test_known_token_counts(size: tuple[int, int], count: int) -> None:
    """The first two are the paper's setting; of the last two only newlines, or nothing, is left."""
    got = num_image_tokens(size, grid_pinpoints=pinpoints(336), image_size=336, patch_size=PATCH)
    assert got == count


def test_tiles_and_tokens_agree() -> None:
    for size in SIZES:
        tiles = tile_image(noise(*size), image_size=28, grid_pinpoints=pinpoints(28)).tiles
        index = image_token_index(
            size, grid_pinpoints=pinpoints(28), image_size=28, patch_size=PATCH
        )
        assert index.max() < len(tiles) * 4 and index.min() >= NEWLINE


@pytest.mark.parametrize("function", [image_token_index, num_image_tokens])
def test_sizes_that_do_not_divide_raise(function: Callable[..., Any]) -> None:
    good: dict[str, Any] = {"grid_pinpoints": [(28, 56)], "image_size": 28, "patch_size": 14}
    function((5, 5), **good)
    with pytest.raises(ValueError, match=r"has \(28, 50\)"):
        function((5, 5), **{**good, "grid_pinpoints": [(28, 56), (28, 50)]})
    with pytest.raises(ValueError, match=r"has \(0, 28\)"):
        function((5, 5), **{**good, "grid_pinpoints": [(0, 28)]})
    with pytest.raises(ValueError, match="image_grid_pinpoints is empty"):
        function((5, 5), **{**good, "grid_pinpoints": []})
    with pytest.raises(ImageError, match="5x0 pixels"):
        function((0, 5), **good)


def test_one_lazy_image_in_many_threads(tmp_path: Path) -> None:
    """``Image.open`` reads pixels when they are asked for: twice at once fails, or mixes them."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            with Image.open(tmp_path / "a.png") as image:
                for found in threads.map(load_image, [image] * 8):
                    np.testing.assert_array_equal(np.asarray(found), pixels)
