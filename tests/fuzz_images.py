"""Odd images, and benchmarks' files with one place spoilt; fuzz_inputs.py says what must come."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_inputs import Rng, damaged, one_line, pick
from hf_models import Case
from odd_images import encode, every_file, in_every_mode, noise
from PIL import Image
from test_composed import write_cirr, write_fashioniq
from test_images import pinpoints, reference_tiles
from test_report import damage, hits, write_run
from test_retrieval import write_set
from test_sts import write_years

from e5v_jax.data.images import FORMATS, MAX_IMAGE_PIXELS, ImageError, image_size, load_image
from e5v_jax.encode.files import IMAGE_SUFFIXES
from e5v_jax.evaluate import composed, retrieval, sts
from e5v_jax.evaluate.report import compare_runs
from e5v_jax.families.llava_next.tiling import tile_image

# --- images


def odd_image(rng: Rng) -> tuple[str, bytes]:
    """(suffix, bytes) of a file: whole, damaged, of an odd mode or size, or no image at all."""
    way = pick(rng, ["damaged"] * 6 + ["whole", "mode", "size", "size", "other", "cut"])
    if way in ("damaged", "whole", "cut"):
        _, fmt, data = pick(rng, list(every_file(noise(20, 30, int(rng.integers(99))))))
        if way == "cut":
            data = data[: int(rng.integers(len(data)))]
        return FORMATS[fmt][0], damaged(rng, data) if way == "damaged" else data
    if way == "mode":
        saved = {"1": "PNG", "L": "PNG", "P": "PNG", "RGBA": "PNG", "LA": "PNG", "I;16": "PNG"}
        saved |= {"CMYK": "JPEG", "YCbCr": "JPEG", "F": "TIFF", "LAB": "TIFF", "I": "TIFF"}
        modes = [(image, saved[image.mode]) for _, image in in_every_mode() if image.mode in saved]
        image, fmt = pick(rng, modes)
        return pick(rng, [".png", ".jpg", ".tif"]), encode(image, fmt)
    if way == "size":
        size = pick(rng, [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 2), (333, 7), (29, 28)])
        fmt = pick(rng, list(FORMATS))
        return pick(rng, IMAGE_SUFFIXES), encode(noise(*size), fmt)
    texts = [b"", b"\0", b"not an image", bytes(5000), b"<svg/>", b"%PDF-1.4\n", rng.bytes(200)]
    icons = [encode(noise(32, 32), fmt) for fmt in ("ICO", "TGA", "PCX", "JPEG2000")]
    return ".png", pick(rng, [*texts, *icons])


def fuzz_image(rng: Rng, folder: Path, case: Case) -> str:
    """An image file: Pillow's pixels and the reference's tiles, or refused where Pillow fails."""
    suffix, data = odd_image(rng)
    path = folder / f"photo{suffix}"
    path.write_bytes(data)
    try:
        with Image.open(path) as image:
            fmt = image.format
            size = (image.height, image.width)
            tile = getattr(image, "tag_v2", {})
            fits = max(np.prod(size), tile.get(322, 1) * tile.get(323, 1)) <= MAX_IMAGE_PIXELS
            readable = fmt in (*FORMATS, "MPO") and fits
            expected = image.convert("RGB") if readable else None
    except Exception:
        expected = None
    refusals = []
    for read in (image_size, load_image):
        for source in (path, data):
            try:
                found = read(source)
            except ImageError as error:
                refusals.append(read)
                one_line(error)
    if expected is None:
        assert refusals.count(load_image) == 2
        return "refused"
    assert not refusals, f"Pillow reads it: {refusals}"
    pixels = Image.fromarray(np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(pixels))
    tiles = tile_image(found, image_size=28, grid_pinpoints=pinpoints(28)).tiles
    np.testing.assert_array_equal(tiles, reference_tiles(pixels, 28))
    return "equal"


# --- evaluation


def odd_json(rng: Rng, value: Any, depth: int = 0) -> Any:
    """``value`` with one place in it replaced or left out."""
    odd = [None, 5, "", " ", "x", [], {}, [5], "\ud800", "a <|eot_id|>", "a\x00", 1e99]
    if depth == 4 or not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return pick(rng, odd)
    if isinstance(value, list):
        at = int(rng.integers(len(value)))
        way = pick(rng, ["drop", "twice", *["in"] * 4])
        inside = {"drop": [], "twice": [value[at]] * 2}
        return [
            *value[:at],
            *inside.get(way, [odd_json(rng, value[at], depth + 1)]),
            *value[at + 1 :],
        ]
    key = pick(rng, list(value))
    rest = {name: item for name, item in value.items() if name != key}
    return rest if rng.random() < 0.2 else {**value, key: odd_json(rng, value[key], depth + 1)}


def spoil(rng: Rng, file: Path) -> None:
    """Damage a file, take it away, or put something else in its place."""
    way = pick(
        rng, ["bytes"] * 3 + ["json"] * 5 + ["empty", "gone", "pipe", "folder", "deep", "none"]
    )
    data = file.read_bytes()
    if way == "json" and file.suffix.startswith(".json"):
        lines = data.splitlines() if file.suffix == ".jsonl" else [data]
        at = int(rng.integers(len(lines)))
        lines[at] = json.dumps(odd_json(rng, json.loads(lines[at]))).encode()
        data = b"\n".join(lines)
    elif way in ("json", "bytes"):
        data = damaged(rng, data)
    elif way != "none":
        file.unlink()
        if way == "pipe":
            os.mkfifo(file)
        if way == "folder":
            file.mkdir()
        data = b"[" * 9999 if way == "deep" else b""
    if way not in ("gone", "pipe", "folder"):
        file.write_bytes(data)


def fuzz_evaluation(rng: Rng, folder: Path, case: Case) -> str:
    """Data of a benchmark with one file spoilt: refused by name, or what the file still says."""
    name = pick(rng, ["retrieval", "sts13", "stsb", "sickr", "cirr", "fashioniq-dress", "compare"])
    check = case.e5v.processor.check_text
    if name == "compare":
        return fuzz_compare(rng, folder)
    if name == "retrieval":
        write_set(folder, captions=2)
        file = folder / "captions.jsonl"
    elif name in ("cirr", "fashioniq-dress"):
        write_cirr(folder) if name == "cirr" else write_fashioniq(folder)
        file = pick(rng, sorted(folder.glob("*/*/*.json")))
    else:
        write_years(folder)
        part = {"sts13": "STS13*", "stsb": "STSB*", "sickr": "SICK"}[name]
        file = pick(
            rng, sorted(path for path in folder.rglob(f"{part}/*") if "SMT" not in path.name)
        )
    spoil(rng, file)
    try:
        if name == "retrieval":
            data: Any = retrieval.load_task(folder, name, 1, check)
        elif name.startswith(("cirr", "fashioniq")):
            data = composed.load(folder, name, 1, check)
            data.fingerprint()
        else:
            data = sts.load_task(folder, name, 1, check)
    except (ValueError, OSError) as error:
        assert str(folder) in one_line(error)
        return "refused"
    if name == "retrieval":
        lines = file.read_bytes().decode().split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        assert data.captions == [row["captions"] for row in rows]
        assert [image.name for image in data.images] == [Path(row["image"]).name for row in rows]
    elif file.suffix == ".json" and "cap" in file.name:
        rows = json.loads(file.read_bytes().decode())
        texts = [row.get("captions") or [row.get("caption")] for row in rows]
        assert [list(captions) for captions in data.captions] == texts
    elif name == "sts13":
        expected = []
        for subset in ("FNWN", "headlines", "OnWN"):
            texts, gold = (
                (file.parent / f"STS.{part}.{subset}.txt").read_bytes().decode()
                for part in ("input", "gs")
            )
            both = zip(texts.split("\n"), gold.split("\n"), strict=False)
            expected += [
                line.removesuffix("\r").split("\t") for line, score in both if score.strip()
            ]
        assert [*map(list, zip(data.sentences1, data.sentences2, strict=True))] == expected
    return "equal"


def fuzz_compare(rng: Rng, folder: Path) -> str:
    """Two runs, one of them spoilt."""
    runs = [write_run(folder / name, [hits(np.arange(9) < 4)]) for name in "ab"]
    file = runs[1] / "items.npz"
    if rng.random() < 0.5:
        values = [np.ones((3, 3)), np.ones(8), np.ones(0), np.full(9, np.nan), np.array([{}] * 9)]
        values += [np.array(["a"] * 9), np.array(5), np.arange(9) < 3, np.full(9, 1e308)]
        key = pick(rng, ["hits", "queries", "data"])
        damage(file, lambda arrays: arrays.update({f"cirr/R@1/{key}": pick(rng, values)}))
    else:
        spoil(rng, file)
    try:
        compare_runs(*runs)
    except (ValueError, OSError) as error:
        one_line(error)
        return "refused"
    return "equal"
