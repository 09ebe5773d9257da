"""CIRR and FashionIQ: files of every layout, prompts, reference removal, two-caption queries."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import e5v_jax
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.command import evaluate
from e5v_jax.evaluate.composed import (
    cirr_rows,
    cirr_submission,
    fashioniq_rows,
    join_captions,
    score_cirr,
    score_fashioniq,
)
from e5v_jax.evaluate.composed_sets import ComposedSet, load_cirr, load_fashioniq, take
from e5v_jax.evaluate.config import EvaluateConfig
from e5v_jax.evaluate.files import any_text
from e5v_jax.evaluate.scores import Hits, Score
from e5v_jax.presets import E5_V

GALLERY = 60


class HashModel:
    """A vector for each (prompt, image, text), not of unit length; keeps what it was asked."""

    template = "llama3"
    preset = E5_V

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def encode(self, inputs: list[Any], *, prompt: str, **options: Any) -> np.ndarray:
        assert options["normalize_embeddings"] is False
        self.asked += [(prompt, item) for item in inputs]
        return np.array([vector(prompt, item) for item in inputs], np.float32)


def vector(prompt: str, item: Any) -> np.ndarray:
    parts = item if isinstance(item, dict) else {"image": item}
    image = parts["image"] if isinstance(parts["image"], bytes) else parts["image"].read_bytes()
    seed = [len(prompt), *image, *parts.get("text", "").encode()]
    rng = np.random.default_rng(seed)
    return rng.normal(size=12) * rng.uniform(0.1, 10)


def embedder() -> CachedEncoder:
    return CachedEncoder(HashModel(), batch_size=8)  # type: ignore[arg-type]


def asked(of: CachedEncoder) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = of._model.asked  # type: ignore[attr-defined]
    return found


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (number, 3 * number % 256, 90)).save(path)


def write_cirr(root: Path, split: str = "val") -> Path:
    """CIRR as its authors lay it out."""
    rng = np.random.default_rng(0)
    folder, prefix = ("dev", "dev") if split == "val" else ("test1", "test1")
    files = {f"{prefix}-{i}-img0": f"./{folder}/{prefix}-{i}-img0.png" for i in range(GALLERY)}
    for number, file in enumerate(files.values()):
        write_image(root / "cirr" / file, number)
    names = list(files)
    queries = []
    for number in range(25):
        reference, target = rng.choice(GALLERY, 2, replace=False)
        query = {
            "pairid": 100 + number,
            "reference": names[reference],
            "caption": f"make it {number}",
            "img_set": {"id": 1, "members": []},
        }
        if split == "val":
            query |= {"target_hard": names[target], "target_soft": {names[target]: 1.0}}
        queries.append(query)
    name = {"val": "val", "test": "test1"}[split]
    for sub, file, content in (
        ("image_splits", f"split.rc2.{name}.json", files),
        ("captions", f"cap.rc2.{name}.json", queries),
    ):
        (root / "cirr" / sub).mkdir(exist_ok=True)
        (root / "cirr" / sub / file).write_text(json.dumps(content))
    return root


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)


def struct(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def cirr_as_parquet(source: Path, root: Path) -> Path:
    folder = source / "cirr"
    files = json.loads((folder / "image_splits" / "split.rc2.val.json").read_text())
    queries = json.loads((folder / "captions" / "cap.rc2.val.json").read_text())
    write_table(
        root / "cirr_imgs" / "data" / "val-0.parquet",
        {"id": list(files), "img": [struct(folder / f) for f in files.values()]},
    )
    write_table(root / "cirr_imgs" / "data" / "test-0.parquet", {"id": ["x"], "img": [None]})
    write_table(
        root / "cirr_val" / "data" / "val-0.parquet",
        {
            "candidate": [struct(folder / files[q["reference"]]) for q in queries],
            "candidate_id": [q["reference"] for q in queries],
            "target_id": [q["target_hard"] for q in queries],
            "caption": [q["caption"] for q in queries],
            "pairid": [q["pairid"] for q in queries],
        },
    )
    return root


def released_cirr_scores(data: ComposedSet) -> torch.Tensor:
    """As the authors' cir(): normalised products, the reference's score set to -1."""
    image_prompt = "<image>\n Describe this image in one word:"
    query_prompt = '<image>Modify this image with "<sent>", desribe modified image in one word:'
    gallery = torch.tensor(np.array([vector(image_prompt, i) for i in data.gallery]))
    queries = torch.tensor(
        np.array(
            [
                vector(query_prompt, {"image": image, "text": text})
                for image, (text,) in zip(data.images, data.captions, strict=True)
            ]
        )
    )
    normal = torch.nn.functional.normalize
    scores = normal(queries.float(), dim=-1) @ normal(gallery.float(), dim=-1).T
    assert data.references is not None
    scores[torch.arange(len(scores)), torch.tensor(data.references)] = -1
    return scores


def test_cirr_recall_is_the_released_code_s(tmp_path: Path) -> None:
    data = load_cirr(write_cirr(tmp_path), "val")
    assert len(data.gallery) == GALLERY and len(data.images) == 25
    scores = released_cirr_scores(data)
    assert data.targets is not None
    found = {score.metric: score for score in score_cirr(embedder(), data)}
    for k in (1, 5, 10, 50):
        best = torch.topk(scores, k, dim=1).indices
        expected = (best == torch.tensor(data.targets)[:, None]).any(dim=1).double().mean()
        assert found[f"R@{k}"].items.value() == pytest.approx(100 * float(expected))
    assert 0 < found["R@10"].items.value() < 100
    assert [row.published.paper for row in cirr_rows(list(found.values()))] == [None] * 4


def test_cirr_reference_removal_matters(tmp_path: Path) -> None:
    """A model that returns the reference image first is right at once when it is removed."""

    class Copies(HashModel):
        def encode(self, inputs: list[Any], *, prompt: str, **_: Any) -> np.ndarray:
            rows = []
            for item in inputs:
                image = item["image"] if isinstance(item, dict) else item
                number = Image.open(image).getpixel((0, 0))[0]  # type: ignore[index]
                row = np.zeros(GALLERY)
                row[number] = 1
                if isinstance(item, dict):
                    row[(number + 1) % GALLERY] = 0.5  # the next image comes second
                rows.append(row)
            return np.array(rows, np.float32)

    data = load_cirr(write_cirr(tmp_path), "val")
    assert data.references is not None
    nexts = (data.references + 1) % GALLERY
    data = ComposedSet(
        data.gallery_ids,
        data.gallery,
        data.images,
        data.captions,
        data.references,
        nexts,
        data.pair_ids,
    )
    scores = score_cirr(CachedEncoder(Copies(), batch_size=8), data)  # type: ignore[arg-type]
    assert scores[0].items.value() == 100


def test_cirr_layouts_agree(tmp_path: Path) -> None:
    source = write_cirr(tmp_path / "a")
    first = load_cirr(source, "val")
    second = load_cirr(cirr_as_parquet(source, tmp_path / "b"), "val")
    assert second.gallery_ids == first.gallery_ids and second.captions == first.captions
    assert second.pair_ids == first.pair_ids
    found = [score_cirr(embedder(), data) for data in (first, second)]
    for ours, theirs in zip(*found, strict=True):
        assert isinstance(ours.items, Hits) and isinstance(theirs.items, Hits)
        np.testing.assert_array_equal(ours.items.hits, theirs.items.hits)
        assert ours.data == theirs.data


def test_cirr_submission_is_what_the_server_takes(tmp_path: Path) -> None:
    data = load_cirr(write_cirr(tmp_path, "test"), "test")
    assert data.targets is None
    submission = cirr_submission(embedder(), data)
    assert submission.pop("version") == "rc2" and submission.pop("metric") == "recall"
    assert list(submission) == [str(100 + i) for i in range(25)]
    expected = torch.topk(released_cirr_scores(data), 50, dim=1).indices.tolist()
    assert data.references is not None
    for row, names in enumerate(submission.values()):
        assert names == [data.gallery_ids[i] for i in expected[row]]
        assert len(names) == 50 and data.gallery_ids[data.references[row]] not in names


def write_fashioniq(root: Path, kind: str = "dress") -> Path:
    """FashionIQ as its authors lay it out."""
    rng = np.random.default_rng(1)
    folder = root / "fashioniq"
    names = [f"B{kind}{i:03}" for i in range(GALLERY)]
    for number, name in enumerate(names):
        write_image(folder / "images" / f"{name}.{'jpg' if number % 2 else 'png'}", number)
    queries = []
    for number in range(150):
        candidate, target = rng.choice(GALLERY, 2, replace=False)
        captions = [f" is {number} times longer.", f"has no sleeves, {number}? "]
        queries.append(
            {"candidate": names[candidate], "target": names[target], "captions": captions}
        )
    for sub, file, content in (
        ("image_splits", f"split.{kind}.val.json", names),
        ("captions", f"cap.{kind}.val.json", queries),
    ):
        (folder / sub).mkdir(exist_ok=True)
        (folder / sub / file).write_text(json.dumps(content))
    return root


def test_captions_are_joined_as_the_authors_do() -> None:
    captions = [" is longer., ", "has no sleeves, really? "]
    assert join_captions(captions) == "is longer, has no sleeves, really"
    assert join_captions(captions[::-1]) == "has no sleeves, really, is longer"


@pytest.mark.parametrize(("kind", "word"), [("dress", "dress"), ("toptee", "shirt")])
def test_fashioniq_recall_is_the_released_code_s(tmp_path: Path, kind: str, word: str) -> None:
    """The sum is of vectors as the model gives them: their lengths weigh."""
    data = load_fashioniq(write_fashioniq(tmp_path, kind), kind)
    used = embedder()
    found = {score.metric: score for score in score_fashioniq(used, kind, data)}
    image_prompt = f"<image>\n Describe this {word} in one word based on its style:"
    query_prompt = (
        f"<image> change the style of this {word} to <sent>\n Desribe this modified {word} in one "
        "word based on its style:"
    )
    assert {prompt for prompt, _ in asked(used)} == {image_prompt, query_prompt}
    queries = []
    for image, captions in zip(data.images, data.captions, strict=True):
        orders = [", ".join(c.strip(".?, ") for c in order) for order in (captions, captions[::-1])]
        total = sum(vector(query_prompt, {"image": image, "text": text}) for text in orders)
        queries.append(total)
    gallery = np.array([vector(image_prompt, image) for image in data.gallery])
    normal = torch.nn.functional.normalize
    scores = (
        normal(torch.tensor(np.array(queries)).float()) @ normal(torch.tensor(gallery).float()).T
    )
    assert data.targets is not None
    for k in (10, 50):
        best = torch.topk(scores, k, dim=1).indices
        right = (best == torch.tensor(data.targets)[:, None]).any(dim=1).double()
        items = found[f"R@{k}"].items
        assert isinstance(items, Hits)
        np.testing.assert_allclose(items.hits, right, atol=1e-12)
    assert 0 < found["R@50"].items.value() < 100


def test_fashioniq_layouts_agree(tmp_path: Path) -> None:
    source = write_fashioniq(tmp_path / "a") / "fashioniq"
    names = json.loads((source / "image_splits" / "split.dress.val.json").read_text())
    queries = json.loads((source / "captions" / "cap.dress.val.json").read_text())

    def file(name: str) -> Path:
        (found,) = (source / "images").glob(f"{name}.*")
        return found

    other = tmp_path / "b"
    write_table(
        other / "fashioniq_val_imgs" / "data" / "val-0.parquet",
        {
            "id": ["other", *names],
            "category": ["shirt", *["dress"] * len(names)],
            "img": [struct(file(names[0])), *(struct(file(name)) for name in names)],
        },
    )
    write_table(
        other / "fashioniq_val" / "data" / "val-0.parquet",
        {
            "candidate": [struct(file(q["candidate"])) for q in queries],
            "target_id": [q["target"] for q in queries],
            "caption": [q["captions"] for q in queries],
            "category": ["dress"] * len(queries),
        },
    )
    found = [
        score_fashioniq(embedder(), "dress", load_fashioniq(root, "dress"))
        for root in (tmp_path / "a", other)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert ours.items.value() == theirs.items.value()
        assert ours.data == theirs.data


def test_fashioniq_average_and_the_paper() -> None:
    def scores(kind: str, queries: int, share: float) -> list[Score]:
        items = Hits((np.arange(queries) < share * queries).astype(float), np.ones(queries, int))
        return [Score(f"fashioniq-{kind}", f"R@{k}", items, "") for k in (10, 50)]

    whole = {
        "dress": scores("dress", 2017, 0.2),
        "shirt": scores("shirt", 2038, 0.3),
        "toptee": scores("toptee", 1961, 0.7),
    }
    rows = fashioniq_rows(whole)
    assert [row.published.paper for row in rows[-2:]] == [31.80, 53.78]
    assert rows[-2].value == pytest.approx(40, abs=0.05)  # of types, not of queries
    assert rows[0].published.paper == 23.75
    assert len(fashioniq_rows({"dress": whole["dress"]})) == 2
    part = fashioniq_rows({**whole, "dress": scores("dress", 100, 0.2)})
    assert part[0].published.paper is None and part[-1].published.paper is None


def test_stride_keeps_the_gallery(tmp_path: Path) -> None:
    data = load_cirr(write_cirr(tmp_path), "val")
    part = take(data, 10)
    assert len(part.gallery) == GALLERY and part.pair_ids == ["100", "110", "120"]
    assert part.captions == data.captions[::10]
    assert part.references is not None and data.references is not None
    assert part.references.tolist() == data.references[::10].tolist()


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


CIRR_CAPTIONS = "cirr/captions/cap.rc2.val.json"


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (CIRR_CAPTIONS, lambda c: c[3].pop("caption"), r"query 3: no 'caption'; found pairid, ref"),
        (
            CIRR_CAPTIONS,
            lambda c: c[3].update(target_hard="x"),
            r"query 3: image 'x' is not in the",
        ),
        (
            CIRR_CAPTIONS,
            lambda c: c[3].update(target_hard=c[3]["reference"]),
            r"query 3: the target is the reference image itself",
        ),
        (CIRR_CAPTIONS, lambda c: c[3].update(pairid="7"), r"query 3: 'pairid' is '7', expected a"),
        (CIRR_CAPTIONS, lambda c: c.clear(), "no queries for a gallery of 60 images"),
        (CIRR_CAPTIONS, lambda c: c[3].update(pairid=104), "two queries have the pairid 104"),
        (
            CIRR_CAPTIONS,
            "5",
            r"cap\.rc2\.val\.json: found a int, expected a list; expected the lay",
        ),
        (CIRR_CAPTIONS, "[" * 9999, r"cap\.rc2\.val\.json: not valid JSON \(maximum recursion"),
        ("cirr/image_splits/split.rc2.val.json", "[]", r"found a list, expected a dict; expected"),
        (CIRR_CAPTIONS, None, r"cap\.rc2\.val\.json: not found; expected the layout of docs/eval"),
        ("cirr/dev/dev-4-img0.png", None, r"image '\./dev/dev-4-img0\.png' not found in .*cirr"),
        ("cirr/image_splits/split.rc2.val.json", "{", r"split\.rc2\.val\.json: not valid JSON"),
    ],
)
def test_damaged_cirr(tmp_path: Path, file: str, edit: Any, message: str) -> None:
    root = write_cirr(tmp_path)
    load_cirr(root, "val")
    if edit is None:
        (root / file).unlink()
    elif isinstance(edit, str):
        (root / file).write_text(edit)
    else:
        change(root / file, edit)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_cirr(root, "val")
    assert "\n" not in str(error.value)


def test_damaged_fashioniq(tmp_path: Path) -> None:
    root = write_fashioniq(tmp_path)
    path = root / "fashioniq" / "captions" / "cap.dress.val.json"
    change(path, lambda c: c[2]["captions"].pop())
    with pytest.raises(ValueError, match=r"query 2: captions \[' is 2 .*\], expected two texts"):
        load_fashioniq(root, "dress")
    (root / "fashioniq" / "images" / "Bdress004.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"image 'Bdress004' not found as .*\.png, \.jpg or"
    ):
        load_fashioniq(root, "dress")
    with pytest.raises(FileNotFoundError, match="neither cirr/ nor cirr_imgs/ in it"):
        load_cirr(root, "val")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cirr(tmp_path)
    write_cirr(tmp_path, "test")
    write_fashioniq(tmp_path)

    class Fake(HashModel):
        @staticmethod
        def load_processor(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(check_text=any_text)

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "Fake":
            return cls()

    monkeypatch.setitem(vars(e5v_jax), "E5V", Fake)
    output = tmp_path / "out"
    tasks = "cirr-test,fashioniq-dress,cirr"
    evaluate(EvaluateConfig(model="m", data=tmp_path, tasks=tasks, output=output))
    results = json.loads((output / "results.json").read_text())["results"]
    assert {r["task"] for r in results} == {"cirr", "fashioniq-dress"}
    submission = json.loads((output / "cirr-submission.json").read_text())
    assert submission["version"] == "rc2" and len(submission) == 27
