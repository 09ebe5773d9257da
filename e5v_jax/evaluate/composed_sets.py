"""The data of composed retrieval, CIRR and FashionIQ, as their authors or the paper's have it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e5v_jax.evaluate.files import (
    ImageRef,
    dataset_folder,
    find_image,
    get,
    read_json,
    read_parquet,
)
from e5v_jax.evaluate.scores import fingerprint

_HINT = "expected the layout of docs/evaluation.md"


@dataclass(frozen=True)
class ComposedSet:
    """These are queries and the gallery they are answered from."""

    gallery_ids: list[str]
    gallery: list[ImageRef]
    images: list[ImageRef]
    """Reference image of each query."""
    captions: list[tuple[str, ...]]
    """One (CIRR) or two (FashionIQ) of each query."""
    references: np.ndarray | None
    """int [Q], gallery row of the reference image; None where it stays in the gallery."""
    targets: np.ndarray | None
    """int [Q], gallery row of the answer; None in a test set."""
    pair_ids: list[str]
    """CIRR's names of its queries; empty otherwise."""

    def fingerprint(self) -> str:
        """Return the hash of the questions asked."""
        answers = [] if self.targets is None else [self.gallery_ids[i] for i in self.targets]
        texts = [text for group in self.captions for text in group]
        return fingerprint([*self.gallery_ids, *texts, *answers])


class _Query(NamedTuple):
    where: str
    captions: tuple[str, ...]
    source: str | ImageRef  # CIRR's by its name in the gallery; FashionIQ's need not be there
    target: str | None  # None in a test set
    pair_id: str = ""


def load_cirr(data: Path, split: str) -> ComposedSet:
    """Read CIRR's ``val`` or ``test`` split, as its authors or the paper's lay it out.

    Raises:
        FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    folder = data / "cirr"
    name = {"val": "val", "test": "test1"}[split]
    if not folder.is_dir():
        return _cirr_parquet(data, split)
    path = folder / "image_splits" / f"split.rc2.{name}.json"
    files = read_json(path, hint=f"{_HINT}: image names to files")
    gallery: list[ImageRef] = [
        find_image(get(files, key, str, str(path)), (folder, folder / "images"), str(path))
        for key in files
    ]
    path = folder / "captions" / f"cap.rc2.{name}.json"
    queries = []
    for number, row in enumerate(read_json(path, hint=f"{_HINT}: a list of queries")):
        where = f"{path}, query {number}"
        reference, caption = (get(row, key, str, where) for key in ("reference", "caption"))
        pair_id = str(get(row, "pairid", int, where))
        target = get(row, "target_hard", str, where) if split == "val" else None
        queries.append(_Query(where, (caption,), reference, target, pair_id))
    return _make_set(list(files), gallery, queries)


def _cirr_parquet(data: Path, split: str) -> ComposedSet:
    folder = dataset_folder(data, "cirr_imgs", neither="cirr/ nor cirr_imgs/")
    images = list(read_parquet(folder, ["id"], ["img"], split=split))
    columns = ["caption", "candidate_id", "pairid"] + (["target_id"] if split == "val" else [])
    folder = dataset_folder(data, f"cirr_{split}", neither=f"cirr/ nor cirr_{split}/")
    queries = [
        _Query(
            f"{folder}, row {number}",
            (row["caption"],),
            str(row["candidate_id"]),
            str(row["target_id"]) if split == "val" else None,
            str(row["pairid"]),
        )
        for number, row in enumerate(read_parquet(folder, columns, [], split=split))
    ]
    return _make_set([row["id"] for row in images], [row["img"] for row in images], queries)


def load_fashioniq(data: Path, kind: str) -> ComposedSet:
    """Read FashionIQ's validation split of one type, as its authors or the paper's lay it out.

    Raises:
        FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    folder = data / "fashioniq"
    if not folder.is_dir():
        return _fashioniq_parquet(data, kind)
    path = folder / "image_splits" / f"split.{kind}.val.json"
    gallery_ids = [str(name) for name in read_json(path, hint=f"{_HINT}: a list of image names")]
    gallery = [_garment(folder, name, str(path)) for name in gallery_ids]
    path = folder / "captions" / f"cap.{kind}.val.json"
    queries = []
    for number, row in enumerate(read_json(path, hint=f"{_HINT}: a list of queries")):
        where = f"{path}, query {number}"
        image = _garment(folder, get(row, "candidate", str, where), where)
        captions = _two(get(row, "captions", list, where), where)
        queries.append(_Query(where, captions, image, get(row, "target", str, where)))
    return _make_set(gallery_ids, gallery, queries)


def _garment(folder: Path, name: str, where: str) -> ImageRef:
    stem = folder / "images" / name
    for suffix in (".png", ".jpg", ".jpeg"):
        if stem.with_name(stem.name + suffix).is_file():
            return stem.with_name(stem.name + suffix)
    raise FileNotFoundError(f"{where}: image {name!r} not found as {stem}.png, .jpg or .jpeg")


def _fashioniq_parquet(data: Path, kind: str) -> ComposedSet:
    name = "fashioniq_val_imgs"
    folder = dataset_folder(data, name, neither=f"fashioniq/ nor {name}/")
    images = [
        row
        for row in read_parquet(folder, ["id", "category"], ["img"], split="val")
        if row["category"] == kind
    ]
    folder = dataset_folder(data, "fashioniq_val", neither="fashioniq/ nor fashioniq_val/")
    columns = ["caption", "target_id", "category"]
    queries = []
    for number, row in enumerate(read_parquet(folder, columns, ["candidate"], split="val")):
        if row["category"] == kind:
            where = f"{folder}, row {number}"
            captions = _two(row["caption"], where)
            queries.append(_Query(where, captions, row["candidate"], str(row["target_id"])))
    return _make_set([row["id"] for row in images], [row["img"] for row in images], queries)


def _two(captions: list[str], where: str) -> tuple[str, ...]:
    if len(captions) != 2 or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"{where}: captions {captions!r}, expected two texts")
    return tuple(captions)


def take(data: ComposedSet, stride: int) -> ComposedSet:
    """Keep every ``stride``-th query; the gallery stays."""
    return replace(
        data,
        images=data.images[::stride],
        captions=data.captions[::stride],
        references=None if data.references is None else data.references[::stride],
        targets=None if data.targets is None else data.targets[::stride],
        pair_ids=data.pair_ids[::stride],
    )


def _make_set(
    gallery_ids: list[str], gallery: list[ImageRef], queries: Sequence[_Query]
) -> ComposedSet:
    if not queries:
        raise ValueError(f"no queries for a gallery of {len(gallery)} images")
    row_of = {name: row for row, name in enumerate(gallery_ids)}
    if len(row_of) != len(gallery_ids):
        raise ValueError("an image is in the gallery twice")
    for query in queries:
        for name in (query.source, query.target):
            if isinstance(name, str) and name not in row_of:
                raise ValueError(
                    f"{query.where}: image {name!r} is not in the gallery of {len(row_of)}"
                )
        if query.source == query.target:
            raise ValueError(f"{query.where}: the target is the reference image itself")
    references = [row_of[query.source] for query in queries if isinstance(query.source, str)]
    images = [gallery[row] for row in references]
    images += [query.source for query in queries if not isinstance(query.source, str)]
    targets = [row_of[query.target] for query in queries if query.target is not None]
    return ComposedSet(
        gallery_ids,
        gallery,
        images,
        [query.captions for query in queries],
        np.array(references) if references else None,
        np.array(targets) if targets else None,
        [query.pair_id for query in queries if query.pair_id],
    )
