"""Text-image retrieval: Flickr30K, COCO and any folder of captioned images; I2I draws the captions.

Protocol: the authors' retrieval.py. A caption hits if its image is among the k best images, an
image if any of its captions is among the k best captions. Scoring raises what
:meth:`CachedEncoder.embed` does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from e5v_jax.evaluate import files
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.config import Protocol
from e5v_jax.evaluate.drawing import draw_caption
from e5v_jax.evaluate.ranking import rank_positives, recalls
from e5v_jax.evaluate.report import Report, Row, make_row
from e5v_jax.evaluate.scores import Score, fingerprint
from e5v_jax.presets import Role
from e5v_jax.prompts import IMAGE, TEXT

AT = (1, 5, 10)
_LABELS = {"flickr30k": "Flickr30K", "coco": "COCO"}
_PAPER_IMAGES = {"flickr30k": 1000, "coco": 5000}  # in the test sets
_PAPER_CAPTIONS = 5  # of each image; COCO has six or seven of some, the authors drop those
_I2I = "i2i-"
OWN = "retrieval"  # takes the data folder itself, whatever is in it
NAMES = [prefix + name for prefix in ("", _I2I) for name in (*_LABELS, OWN)]


@dataclass(frozen=True)
class CaptionedImages:
    """These are images with their captions."""

    images: list[files.ImageRef]
    captions: list[list[str]]  # [images][captions of it], at least one each

    def flat(self) -> tuple[list[str], np.ndarray]:
        """Return all captions, and int [C], ascending: the image that each belongs to."""
        counts = [len(group) for group in self.captions]
        return list(chain(*self.captions)), np.repeat(np.arange(len(counts)), counts)


def load_captioned(folder: Path, check: files.CheckText = files.any_text) -> CaptionedImages:
    """Read ``captions.jsonl``, ``{"image": "a.jpg", "captions": ["...", ...]}`` on each line.

    Image names are relative to ``folder/images`` or ``folder``; ``check`` looks at the captions.
    A file that two rows name is refused: a caption of one would have to find the other's image,
    which is the same. Raises FileNotFoundError, ValueError: names file and row, and what was
    expected.
    """
    return _collect(folder / "captions.jsonl", _read_jsonl(folder), check)


def load_task(
    data: Path, name: str, stride: int = 1, check: files.CheckText = files.any_text
) -> CaptionedImages:
    """Read the set of a task: ``data`` itself for ``retrieval``, else DATA/name or Parquet files.

    Every ``stride``-th image is taken; a task with drawn captions has the set of that without.
    Raises FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    if name.startswith(_I2I):  # a picture may show any text
        name, check = name.removeprefix(_I2I), files.any_text
    if name == OWN:
        return take(load_captioned(data, check), stride)
    if (data / name).is_dir():
        found = load_captioned(data / name, check)
    else:
        neither = f"{name}/captions.jsonl nor {name}_test/*.parquet"
        folder = files.dataset_folder(data, f"{name}_test", neither=neither)
        rows = files.read_parquet(folder, ["text"], ["image"], split="test")
        named = ((str(row["image"]), row["image"], row["text"]) for row in rows)
        found = _collect(folder, named, check)
    kept = [group[:_PAPER_CAPTIONS] for group in found.captions]
    return take(CaptionedImages(found.images, kept), stride)


def score_retrieval(
    encoder: CachedEncoder, name: str, data: CaptionedImages, *, drawn: bool = False
) -> list[Score]:
    """Score image and text recall at 1, 5, 10; with ``drawn`` captions are embedded as pictures."""
    captions, image_of = data.flat()

    def embed(role: Role) -> tuple[np.ndarray, np.ndarray]:
        of_image = encoder.prompt(IMAGE, role)
        images = encoder.embed(data.images, prompt=of_image, make=files.as_input)
        texts = encoder.embed(
            captions,
            prompt=of_image if drawn else encoder.prompt(TEXT, role),
            make=draw_caption if drawn else str,
            where=lambda i: f"caption {captions[i]!r} of {data.images[image_of[i]]}",
        )
        return texts, images

    documents, preset = embed("document"), encoder.preset
    queries = documents if preset.query == preset.document else embed("query")
    names = [p.name if isinstance(p, Path) else str(p.row) for p in data.images]
    asked = fingerprint([*names, *captions])
    return score_vectors(name, *documents, image_of, asked, queries=queries)


def score_vectors(
    name: str,
    texts: np.ndarray,
    images: np.ndarray,
    image_of: np.ndarray,
    data: str,
    *,
    queries: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Score]:
    """Score image and text recall of a task from normalised ``texts`` [C, D] and ``images`` [N, D].

    ``image_of``, int [C], ascending, is the image that each caption belongs to; ``data`` is the
    hash of the questions. ``queries`` are texts and images where they are searched by, if those are
    other vectors.
    """
    by_text, by_image = queries or (texts, images)
    captions_of = np.split(np.arange(len(texts)), np.cumsum(np.bincount(image_of))[:-1])
    to_image = rank_positives(by_text, images, [np.array([i]) for i in image_of])
    return [
        # a unit is an image with its captions, as they are no independent draws
        *recalls(name, to_image, AT, data, prefix="image ", unit_of=image_of),
        *recalls(name, rank_positives(by_image, texts, captions_of), AT, data, prefix="text "),
    ]


def report_rows(name: str, data: CaptionedImages, scores: list[Score], *, label: str) -> list[Row]:
    """Make the rows for the report; the paper's figures only beside a set of the paper's size."""
    counts = [len(group) for group in data.captions]
    images = _PAPER_IMAGES.get(name.removeprefix(_I2I))
    whole = len(counts) == images and set(counts) == {_PAPER_CAPTIONS}
    items = f"{len(counts)} images, {sum(counts)} captions"
    return [make_row(name, label, items, [score], whole) for score in scores]


def take(data: CaptionedImages, stride: int) -> CaptionedImages:
    """Keep every ``stride``-th image with its captions."""
    return CaptionedImages(data.images[::stride], data.captions[::stride])


def _read_jsonl(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    path, images = folder / "captions.jsonl", folder / "images"
    line = '{"image": "a.jpg", "captions": ["a dog", ...]}'
    hint = f"expected lines {line} and the images in {images}"
    for number, line in enumerate(files.read_lines(path, hint=hint), start=1):
        if line.strip():
            where = f"{path}, row {number}"
            row = files.parse_json(line, where)
            image = files.find_image(files.get(row, "image", str, where), (images, folder), where)
            yield where, image, files.get(row, "captions", list, where)


def _collect(
    source: Path, rows: Iterator[tuple[str, files.ImageRef, list[str]]], check: files.CheckText
) -> CaptionedImages:
    found = CaptionedImages([], [])
    places: dict[files.ImageRef, str] = {}  # by file, whatever names lead to it
    for where, image, group in rows:
        if not group or not all(isinstance(text, str) and text.strip() for text in group):
            raise ValueError(f"{where}: captions {group!r}, expected a list of texts, none empty")
        files.check_texts(group, check, where)
        file = image.resolve() if isinstance(image, Path) else image
        if (first := places.setdefault(file, where)) is not where:
            raise ValueError(f"{where}: image {file} is there already: see {first}; join the rows")
        found.images.append(image)
        found.captions.append(group)
    if len(found.images) < 2:
        raise ValueError(f"{source}: {len(found.images)} images, expected at least 2")
    return found


def score(encoder: CachedEncoder, data: Mapping[str, CaptionedImages], _: Protocol) -> Report:
    """Score the one task that was loaded."""
    ((name, items),) = data.items()
    base = name.removeprefix(_I2I)
    drawn = base != name
    label = _LABELS.get(base, "own images") + (", drawn captions" if drawn else "")
    scores = score_retrieval(encoder, name, items, drawn=drawn)
    return Report({}, report_rows(name, items, scores, label=label), scores)
