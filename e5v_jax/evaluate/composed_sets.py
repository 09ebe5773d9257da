"""The data of composed retrieval, CIRR and FashionIQ, as their authors or the paper's have it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Queries and the gallery they are answered from."""

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
        """Hash of the questions asked."""
        answers = [] if self.targets is None else [self.gallery_ids[i] for i in self.targets]
        texts = [text for group in self.captions for text in group]
        return fingerprint([*self.gallery_ids, *texts, *answers])


def load_cirr(data: Path, split: str) -> ComposedSet:
    """CIRR's ``val`` or ``test`` split, as its authors or the paper's lay it out.

    Raises:
        FileNotFoundError, ValueError: names file and row, and what was expected.
    """
    folder = data / "cirr"
    name = {"val": "val", "test": "test1"}[split]
    if not folder.is_dir():
        return _cirr_parquet(data, split)
    path = folder / "image_splits" / f"split.rc2.{name}.json"
    files = read_json(path, hint=f"{_HINT}: image names to files")
    gallery_ids = list(files)
    gallery: list[ImageRef] = [
        find_image(get(files, key, str, str(path)), (folder, folder / "images"), str(path))
        for key in gallery_ids
    ]
    path = folder / "captions" / f"cap.rc2.{name}.json"
    queries: list[dict[str, Any]] = []
    for number, row in enumerate(read_json(path, hint=f"{_HINT}: a list of queries")):
        where = f"{path}, query {number}"
        query = {key: get(row, key, str, where) for key in ("reference", "caption")}
        query["pairid"] = str(get(row, "pairid", int, where))
        if split == "val":
            query["target"] = get(row, "target_hard", str, where)
        queries.append({**query, "where": where})
    return _cirr_set(gallery_ids, gallery, queries, answered=split == "val")


def _cirr_parquet(data: Path, split: str) -> ComposedSet:
    images = list(read_parquet(_existing(data, "cirr_imgs", "cirr"), ["id"], ["img"], split=split))
    columns = ["caption", "candidate_id", "pairid"] + (["target_id"] if split == "val" else [])
    folder = _existing(data, f"cirr_{split}", "cirr")
    queries = [
        {
            "reference": row["candidate_id"],
            "caption": row["caption"],
            "pairid": str(row["pairid"]),
            "target": row.get("target_id"),
            "where": f"{folder}, row {number}",
        }
        for number, row in enumerate(read_parquet(folder, columns, [], split=split))
    ]
    gallery_ids = [row["id"] for row in images]
    return _cirr_set(gallery_ids, [row["img"] for row in images], queries, answered=split == "val")


def _cirr_set(
    gallery_ids: list[str],
    gallery: list[ImageRef],
    queries: Sequence[dict[str, Any]],
    *,
    answered: bool,
) -> ComposedSet:
    row_of = {name: row for row, name in enumerate(gallery_ids)}
    references = [_row(row_of, query["reference"], query["where"]) for query in queries]
    targets = None
    if answered:
        targets = np.array([_row(row_of, query["target"], query["where"]) for query in queries])
        for query, reference, target in zip(queries, references, targets, strict=True):
            if reference == target:
                raise ValueError(f"{query['where']}: the target is the reference image itself")
    return _checked(
        ComposedSet(
            gallery_ids,
            gallery,
            [gallery[row] for row in references],
            [(query["caption"],) for query in queries],
            np.array(references),
            targets,
            [query["pairid"] for query in queries],
        )
    )


def load_fashioniq(data: Path, kind: str) -> ComposedSet:
    """FashionIQ's validation split of one type, as its authors or the paper's lay it out.

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
        captions, target = get(row, "captions", list, where), get(row, "target", str, where)
        queries.append((image, captions, target, where))
    return _fashioniq_set(gallery_ids, gallery, queries)


def _garment(folder: Path, name: str, where: str) -> ImageRef:
    stem = folder / "images" / name
    for suffix in (".png", ".jpg", ".jpeg"):
        if stem.with_name(stem.name + suffix).is_file():
            return stem.with_name(stem.name + suffix)
    raise FileNotFoundError(f"{where}: image {name!r} not found as {stem}.png, .jpg or .jpeg")


def _fashioniq_parquet(data: Path, kind: str) -> ComposedSet:
    folder = _existing(data, "fashioniq_val_imgs", "fashioniq")
    images = [
        row
        for row in read_parquet(folder, ["id", "category"], ["img"], split="val")
        if row["category"] == kind
    ]
    folder = _existing(data, "fashioniq_val", "fashioniq")
    columns = ["caption", "target_id", "category"]
    queries = [
        (row["candidate"], row["caption"], row["target_id"], f"{folder}, row {number}")
        for number, row in enumerate(read_parquet(folder, columns, ["candidate"], split="val"))
        if row["category"] == kind
    ]
    return _fashioniq_set([row["id"] for row in images], [row["img"] for row in images], queries)


def _fashioniq_set(
    gallery_ids: list[str],
    gallery: list[ImageRef],
    queries: Sequence[tuple[ImageRef, list[str], str, str]],
) -> ComposedSet:
    row_of = {name: row for row, name in enumerate(gallery_ids)}
    for _, captions, _, where in queries:
        if len(captions) != 2 or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"{where}: captions {captions!r}, expected two texts")
    return _checked(
        ComposedSet(
            gallery_ids,
            gallery,
            [image for image, *_ in queries],
            [(captions[0], captions[1]) for _, captions, *_ in queries],
            None,
            np.array([_row(row_of, target, where) for _, _, target, where in queries], int),
            [],
        )
    )


def take(data: ComposedSet, stride: int) -> ComposedSet:
    """Every ``stride``-th query; the gallery stays."""
    return ComposedSet(
        data.gallery_ids,
        data.gallery,
        data.images[::stride],
        data.captions[::stride],
        None if data.references is None else data.references[::stride],
        None if data.targets is None else data.targets[::stride],
        data.pair_ids[::stride],
    )


def _row(row_of: dict[str, int], name: str, where: str) -> int:
    if name not in row_of:
        raise ValueError(f"{where}: image {name!r} is not in the gallery of {len(row_of)}")
    return row_of[name]


def _existing(data: Path, dataset: str, task: str) -> Path:
    folder = dataset_folder(data, dataset)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{data}: neither {task}/ nor {dataset}/ in it, see docs/evaluation.md"
        )
    return folder


def _checked(data: ComposedSet) -> ComposedSet:
    if not data.images:
        raise ValueError(f"no queries for a gallery of {len(data.gallery)} images")
    if len(set(data.gallery_ids)) != len(data.gallery_ids):
        raise ValueError("an image is in the gallery twice")
    return data
