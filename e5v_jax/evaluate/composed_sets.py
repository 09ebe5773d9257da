"""The data of composed retrieval, CIRR and FashionIQ, as their authors or the paper's have it.

The loaders raise FileNotFoundError and ValueError: these name file, row and what was expected.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.evaluate import files
from e5v_jax.evaluate.scores import fingerprint

_HINT = "expected the layout of docs/evaluation.md"


@dataclass(frozen=True)
class ComposedSet:
    """These are queries and the gallery they are answered from."""

    gallery_ids: list[str]
    gallery: list[files.ImageRef]
    images: list[files.ImageRef]  # reference image of each query
    captions: list[tuple[str, ...]]  # one (CIRR) or two (FashionIQ) of each query
    references: np.ndarray | None  # int [Q], gallery rows of images; None where they stay in
    targets: np.ndarray | None  # int [Q], gallery row of the answer; None in a test set
    pair_ids: list[str]  # CIRR's names of its queries; empty otherwise

    def fingerprint(self) -> str:
        """Return the hash of the questions asked."""
        answers = [] if self.targets is None else [self.gallery_ids[i] for i in self.targets]
        return fingerprint([*self.gallery_ids, *chain(*self.captions), *answers])


_Gallery = list[tuple[str, files.ImageRef]]
# Where it stands, its captions, its source, target (None in a test set) and name: CIRR's source is
# named, and in the gallery; FashionIQ's is an image that need not be there.
_Query = tuple[str, tuple[str, ...], str | files.ImageRef, str | None, str]


def load_cirr(data: Path, split: str, check: files.CheckText = files.any_text) -> ComposedSet:
    """Read CIRR's ``val`` or ``test`` split, as its authors or the paper's lay it out."""
    folder, answered = data / "cirr", split == "val"
    number: type
    if folder.is_dir():
        name = "val" if answered else "test1"
        path = folder / "image_splits" / f"split.rc2.{name}.json"
        named = files.read_json(path, dict, hint=f"{_HINT}: image names to files")
        folders, where = (folder, folder / "images"), str(path)
        gallery: _Gallery = [
            (key, files.find_image(files.get(named, key, str, where), folders, where))
            for key in named
        ]
        source, answer, number = "reference", "target_hard", int
        rows = _json_rows(folder / "captions" / f"cap.rc2.{name}.json")
    else:
        images = _parquet_rows(data, "cirr_imgs", split, ["id"], ["img"])
        gallery = [(row["id"], row["img"]) for _, row in images]
        source, answer, number = "candidate_id", "target_id", object
        columns = ["caption", source, "pairid", *([answer] if answered else [])]
        rows = _parquet_rows(data, f"cirr_{split}", split, columns, [])
    queries: list[_Query] = []
    for where, row in rows:
        caption, reference = (files.get(row, key, str, where) for key in ("caption", source))
        target = files.get(row, answer, str, where) if answered else None
        pair_id = str(files.get(row, "pairid", number, where))
        queries.append((where, (caption,), reference, target, pair_id))
    return _make_set(data, gallery, queries, check)


def load_fashioniq(data: Path, kind: str, check: files.CheckText = files.any_text) -> ComposedSet:
    """Read FashionIQ's validation split of one type, as its authors or the paper's lay it out."""
    folder = data / "fashioniq"
    candidate: type
    if folder.is_dir():
        path = folder / "image_splits" / f"split.{kind}.val.json"
        names = map(str, files.read_json(path, list, hint=f"{_HINT}: a list of image names"))
        gallery = [(name, _garment(folder, name, str(path))) for name in names]
        texts, answer, candidate = "captions", "target", str
        rows = _json_rows(folder / "captions" / f"cap.{kind}.val.json")
    else:
        images = _parquet_rows(data, "fashioniq_val_imgs", "val", ["id", "category"], ["img"])
        gallery = [(row["id"], row["img"]) for _, row in images if row["category"] == kind]
        texts, answer, candidate = "caption", "target_id", files.ParquetImage
        columns = [texts, answer, "category"]
        every = _parquet_rows(data, "fashioniq_val", "val", columns, ["candidate"])
        rows = (item for item in every if item[1]["category"] == kind)
    queries: list[_Query] = []
    for where, row in rows:
        image = files.get(row, "candidate", candidate, where)
        if isinstance(image, str):
            image = _garment(folder, image, where)
        captions = files.get(row, texts, list, where)
        if len(captions) != 2 or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"{where}: captions {captions!r}, expected two texts")
        queries.append((where, tuple(captions), image, files.get(row, answer, str, where), ""))
    return _make_set(data, gallery, queries, check)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(files.read_json(path, list, hint=f"{_HINT}: a list of queries")):
        yield f"{path}, query {number}", row


def _parquet_rows(
    data: Path, name: str, split: str, columns: list[str], images: list[str]
) -> Iterator[tuple[str, Any]]:
    folder = files.dataset_folder(data, name, neither=f"{name.partition('_')[0]}/ nor {name}/")
    for number, row in enumerate(files.read_parquet(folder, columns, images, split=split)):
        yield f"{folder}, row {number}", row


def _garment(folder: Path, name: str, where: str) -> files.ImageRef:
    stem = folder / "images" / name
    for suffix in (".png", ".jpg", ".jpeg"):
        if (path := Path(f"{stem}{suffix}")).is_file():
            return path
    raise FileNotFoundError(f"{where}: image {name!r} not found as {stem}.png, .jpg or .jpeg")


def take(data: ComposedSet, stride: int) -> ComposedSet:
    """Keep every ``stride``-th query; the gallery stays."""
    of_queries = ("images", "captions", "references", "targets", "pair_ids")
    values = ((name, getattr(data, name)) for name in of_queries)
    return replace(data, **{k: v[::stride] for k, v in values if v is not None})


def _make_set(
    data: Path, gallery: _Gallery, queries: Sequence[_Query], check: files.CheckText
) -> ComposedSet:
    if not queries:
        raise ValueError(f"{data}: no queries for a gallery of {len(gallery)} images")
    row_of = {name: row for row, (name, _) in enumerate(gallery)}
    if len(row_of) != len(gallery):
        raise ValueError(f"{data}: an image is in the gallery twice")
    for where, captions, source, target, _ in queries:
        files.check_texts([" ".join(captions)], check, where)  # as one text, as they are embedded
        for name in (source, target):
            if isinstance(name, str) and name not in row_of:
                raise ValueError(f"{where}: image {name!r} is not in the gallery of {len(row_of)}")
        if source == target:
            raise ValueError(f"{where}: the target is the reference image itself")
    _, texts, sources, targets, pair_ids = zip(*queries, strict=True)
    named = [name for name in pair_ids if name]
    if len(set(named)) != len(named):  # the answer to one would replace that to the other
        raise ValueError(f"{data}: two queries have the pairid {max(named, key=named.count)}")
    references = [row_of[source] for source in sources if isinstance(source, str)]
    return ComposedSet(
        gallery_ids=list(row_of),
        gallery=[image for _, image in gallery],
        images=[gallery[row_of[s]][1] if isinstance(s, str) else s for s in sources],
        captions=list(texts),
        references=np.array(references) if references else None,
        targets=None if None in targets else np.array([row_of[name] for name in targets]),
        pair_ids=named,
    )
