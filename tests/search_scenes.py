"""Drawn pictures with a name for what is on them, and an embedding that knows these names.

What is tested and photographed is the page, not a model: a word is the mean colour of the pictures
drawn for it, in a few places of the picture.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from e5v_jax.data.images import load_image
from e5v_jax.data.inputs import Input, split_input
from e5v_jax.search.index import OnError, update
from e5v_jax.search.writer import Writer

KINDS = {  # sky above and below, ground, what stands there
    "sunset": ((250, 170, 90), (214, 84, 92), (70, 40, 66), (255, 226, 150)),
    "night": ((12, 18, 44), (36, 48, 92), (14, 18, 30), (236, 236, 214)),
    "snow": ((186, 208, 226), (226, 236, 244), (246, 248, 250), (120, 140, 160)),
    "forest": ((164, 204, 214), (206, 226, 206), (38, 84, 52), (24, 62, 40)),
    "beach": ((110, 186, 226), (176, 220, 236), (232, 208, 158), (255, 240, 190)),
    "desert": ((242, 200, 140), (250, 224, 176), (206, 140, 74), (176, 104, 56)),
}
TEXTS = (
    "The sunset turned the whole bay orange.",
    "At night the harbour is silent but for the ropes.",
    "Snow fell on the roofs until morning.",
    "The forest path is soft with needles.",
)


def draw_scene(kind: str, seed: int, size: tuple[int, int] = (480, 360)) -> Image.Image:
    """A landscape of its kind: sky, sun or moon, hills, trees or waves by chance."""
    random = np.random.default_rng([seed, *kind.encode()])
    top, low, ground, thing = (np.array(colour) for colour in KINDS[kind])
    width, height = size
    shade = np.linspace(0, 1, height)[:, None]
    pixels = np.repeat((top * (1 - shade) + low * shade)[:, None], width, axis=1)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    horizon = int(height * random.uniform(0.55, 0.68))
    x, y, r = random.uniform(0.15, 0.85) * width, horizon * random.uniform(0.25, 0.8), height / 12
    if kind != "forest":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(thing))
    for layer in range(3):
        phase, wave = random.uniform(0, 6), random.uniform(60, 130)
        tone = (ground * (0.72 + 0.14 * layer)).clip(0, 255).astype(int)
        points = [
            (at, horizon + layer * height * 0.12 + 14 * np.sin(at / wave + phase))
            for at in range(0, width + 8, 8)
        ]
        draw.polygon([*points, (width, height), (0, height)], fill=tuple(tone))
    for _ in range(14 if kind in ("forest", "snow") else 0):
        x, y = random.uniform(0, width), random.uniform(horizon + 10, height)
        tall = random.uniform(0.12, 0.3) * height
        draw.polygon([(x - tall / 4, y), (x + tall / 4, y), (x, y - tall)], fill=tuple(thing))
    return image.filter(ImageFilter.GaussianBlur(0.6))


def make_scenes(folder: Path) -> Path:
    """Five pictures of each kind, one of them twice (a little brighter), and a text file."""
    folder.mkdir(parents=True)
    for kind in KINDS:
        for number in range(5):
            draw_scene(kind, number).save(folder / f"{kind}-{number}.jpg", quality=88)
        again = draw_scene(kind, 0).point(lambda value: min(255, value + 2))
        again.save(folder / f"{kind}-0-edited.jpg", quality=80)
    (folder / "diary.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def _colours(image: Image.Image) -> np.ndarray:
    small = np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX), np.float32)
    colours = (small / 255 - 0.5).ravel()
    return colours / np.linalg.norm(colours)


@cache
def _prototype(kind: str) -> np.ndarray:
    return np.mean([_colours(draw_scene(kind, number)) for number in range(5)], axis=0)


def embed_scene(item: Input) -> np.ndarray:
    """A unit vector [49] of a text with names of kinds, a picture, or both."""
    text, image = split_input(item)
    vector = np.zeros(49, np.float32)
    named = [kind for kind in KINDS if kind in (text or "").lower()]
    for kind in named:
        vector[:48] += _prototype(kind)
    if text is not None and not named:
        vector[48] = 1  # some other text
    if image is not None:
        vector[:48] += _colours(load_image(image))
    vector[48] += 0.1
    return vector / np.linalg.norm(vector)


def embed_scenes(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
    """Vectors [N, 49]."""
    return np.stack([embed_scene(item) for item in inputs])


def index_scenes(folder: Path) -> Path:
    """Draw FOLDER/photos and index it in FOLDER/index."""
    writer = Writer(folder / "index")
    with writer.commit():
        writer.set_meta(identity={}, model={"model": "drawn"})
    update(writer, [make_scenes(folder / "photos")], embed_scenes)
    writer.close()
    return folder / "index"
