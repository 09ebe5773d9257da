"""Text-image retrieval: Flickr30K, COCO and any folder of captioned images; I2I draws the captions.

Protocol: the authors' retrieval.py. A caption hits if its image is among the k best images, an
image if any of its captions is among the k best captions.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e5v_jax.evaluate.drawing import draw_caption
from e5v_jax.evaluate.embedding import Embedder
from e5v_jax.evaluate.files import (
    ImageRef,
    dataset_folder,
    find_image,
    get,
    load,
    read_parquet,
)
from e5v_jax.evaluate.ranking import hits_at, rank_positives
from e5v_jax.evaluate.report import Row, make_row
from e5v_jax.evaluate.scores import Hits, Score, fingerprint
from e5v_jax.prompts import IMAGE, TEXT

AT = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalTask:
    """A set as the paper has it."""

    label: str
    images: int
    """Images of the paper's test set."""
    dataset: str
    """Its name on the hub."""


TASKS = {
    "flickr30k": RetrievalTask("Flickr30K", 1000, "flickr30k_test"),
    "coco": RetrievalTask("COCO", 5000, "coco_test"),
}
_PAPER_CAPTIONS = 5  # of each image; COCO has six or seven of some, the authors drop those
OWN = "retrieval"
"""The task that takes the data folder itself, whatever is in it."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images with their captions."""

    images: list[ImageRef]
    captions: list[list[str]]
    """[images][captions of it], at least one each."""


def load_captioned(folder: Path) -> CaptionedImages:
    """Read ``captions.jsonl``, ``{"image": "a.jpg", "captions": ["...", ...]}`` on each line.

    Image names are relative to ``folder/images`` or ``folder``.

    Raises:
        FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    path = folder / "captions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: not found; expected lines {{"image": "a.jpg", "captions": ["a dog", ...]}} '
            f"and the images in {folder / 'images'}"
        )
    return _collect(path, _read_jsonl(path))


def load_task(data: Path, name: str) -> CaptionedImages:
    """The set of a task: ``data`` itself for ``retrieval``, else DATA/name or its Parquet form.

    Raises:
        FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    if name == OWN:
        return load_captioned(data)
    if (data / name).is_dir():
        return _first_captions(load_captioned(data / name))
    task = TASKS[name]
    folder = dataset_folder(data, task.dataset)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{data}: neither {name}/captions.jsonl nor {task.dataset}/*.parquet in it, see "
            "docs/evaluation.md"
        )
    rows = read_parquet(folder, ["text"], ["image"], split="test")
    found = _collect(folder, ((str(row["image"]), row["image"], row["text"]) for row in rows))
    return _first_captions(found)


def score_retrieval(
    embedder: Embedder, name: str, data: CaptionedImages, *, drawn: bool = False
) -> list[Score]:
    """Image and text recall at 1, 5 and 10; with ``drawn`` captions are embedded as pictures.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    captions = [caption for group in data.captions for caption in group]
    image_of = np.repeat(np.arange(len(data.images)), [len(group) for group in data.captions])
    images = embedder.embed(
        data.images, prompt=IMAGE, make=load, where=lambda i: str(data.images[i])
    )
    texts = embedder.embed(
        captions,
        prompt=IMAGE if drawn else TEXT,
        make=draw_caption if drawn else str,
        where=lambda i: f"caption {captions[i]!r} of {data.images[image_of[i]]}",
    )
    names = [p.name if isinstance(p, Path) else str(p.row) for p in data.images]
    return score_vectors(name, texts, images, image_of, fingerprint([*names, *captions]))


def score_vectors(
    name: str, texts: np.ndarray, images: np.ndarray, image_of: np.ndarray, data: str
) -> list[Score]:
    """The same from vectors, normalised.

    Args:
        name: of the task.
        texts: [C, D].
        images: [N, D].
        image_of: int [C], ascending: the image that each caption belongs to.
        data: hash of the questions.
    """
    counts = np.bincount(image_of, minlength=len(images))
    captions_of = np.split(np.arange(len(texts)), np.cumsum(counts)[:-1])
    to_image = rank_positives(texts, images, [np.array([i]) for i in image_of])
    to_text = rank_positives(images, texts, captions_of)
    scores = []
    for k in AT:  # a unit is an image with its captions, as they are no independent draws
        hits = np.bincount(image_of, hits_at(to_image, k), minlength=len(images))
        scores.append(Score(name, f"image R@{k}", Hits(hits, counts), data))
    for k in AT:
        hits = hits_at(to_text, k)
        scores.append(Score(name, f"text R@{k}", Hits(hits, np.ones(len(images), int)), data))
    return scores


def report_rows(name: str, data: CaptionedImages, scores: list[Score], *, label: str) -> list[Row]:
    """Rows for the report; the paper's figures only beside a set of the paper's size."""
    base = name.removeprefix("i2i-")
    counts = {len(group) for group in data.captions}
    whole = base in TASKS and len(data.images) == TASKS[base].images
    comparable = whole and counts == {_PAPER_CAPTIONS}
    captions = sum(len(group) for group in data.captions)
    items = f"{len(data.images)} images, {captions} captions"
    return [make_row(name, label, items, [score], comparable) for score in scores]


def take(data: CaptionedImages, stride: int) -> CaptionedImages:
    """Every ``stride``-th image with its captions."""
    return CaptionedImages(data.images[::stride], data.captions[::stride])


def _first_captions(data: CaptionedImages) -> CaptionedImages:
    return CaptionedImages(data.images, [group[:_PAPER_CAPTIONS] for group in data.captions])


def _read_jsonl(path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    folders = (path.parent / "images", path.parent)
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, row {row}: expected UTF-8, {error.reason}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        image = find_image(get(row, "image", str, where), folders, where)
        yield where, image, get(row, "captions", list, where)


def _collect(source: Path, rows: Iterator[tuple[str, ImageRef, list[str]]]) -> CaptionedImages:
    images, captions = [], []
    for where, image, group in rows:
        if not group or not all(isinstance(text, str) and text.strip() for text in group):
            raise ValueError(f"{where}: captions {group!r}, expected a list of texts, none empty")
        images.append(image)
        captions.append(group)
    if len(images) < 2:
        raise ValueError(f"{source}: {len(images)} images, expected at least 2")
    return CaptionedImages(images, captions)
