"""Smoothing: the same vectors without int8, bit for bit, and nearer ones with it."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import RECIPES, TEXT_RECIPES, build_llava, build_text
from training_runs import config, write_csv

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf
from e5v_jax.checkpoints.converted import ConvertedFolder, write_again
from e5v_jax.checkpoints.smooth import Args, find_exponents, scaled, smooth
from e5v_jax.nn import layers, quantized
from e5v_jax.train.loop import train

TEXTS = ["A dog runs.", "Two cats sleep on a roof.", "snow", "The mountain is high and cold today."]


def with_outliers(src: Path, dst: Path) -> Path:
    """The folder again, some channels of its norms and value heads much larger."""
    base = ConvertedFolder(src)
    rng = np.random.default_rng(3)
    arrays = {}
    for name in base.shapes():
        (array,) = base.read([name])
        if "layernorm.scale" in name:
            array = array * np.where(rng.random(array.shape) < 0.1, 20.0, 1.0)
        arrays[name] = np.asarray(array, base.info.dtype)
    dst.mkdir()
    write_again(dst, base, [arrays])
    return dst


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3-tied", "llava"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with outliers, and the same smoothed."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        build_llava(next(iter(RECIPES.values())), folder / "hf")
    else:
        build_text(TEXT_RECIPES[request.param], folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "converted"))
    base = with_outliers(folder / "converted", folder / "base")
    smooth(Args(base, folder / "smooth"))
    return base, folder / "smooth"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_int8_nothing_changes(folders: tuple[Path, Path], dtype: Any) -> None:
    before, after = (E5V.from_pretrained(x, dtype=dtype).encode(TEXTS) for x in folders)
    assert np.array_equal(before, after)
    base, smoothed = (ConvertedFolder(x, verify=x is folders[1]) for x in folders)
    assert smoothed.info.smoothed and not base.info.smoothed
    changed = [
        name
        for name in base.shapes()
        if not np.array_equal(next(base.read([name])), next(smoothed.read([name])))
    ]
    assert any("v_proj" in name for name in changed) and any("down" in name for name in changed)


def test_int8_is_nearer(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself: rotation, which has the same end, is left out. Both together: the slow test."""
    for module in (layers, quantized):
        monkeypatch.setattr(module, "rotate", lambda x, precision: x)
    exact = E5V.from_pretrained(folders[0], dtype="float32").encode(TEXTS)
    errors = [
        1 - (E5V.from_pretrained(x, dtype="float32", quantize="int8").encode(TEXTS) * exact).sum(1)
        for x in folders
    ]
    assert errors[1].mean() < 0.7 * errors[0].mean()


def test_what_it_would_not_fit_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, smoothed = folders
    with pytest.raises(ValueError, match="is smoothed already"):
        smooth(Args(smoothed, tmp_path / "again"))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="is smoothed, which no adapter of the model before fits"):
        E5V.from_pretrained(smoothed, adapter=tmp_path / "adapter")
    write_csv(tmp_path / "data.csv")
    cfg = config(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="is smoothed; train on the model"):
        train(dataclasses.replace(cfg, model=smoothed))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty.txt: no sentences"):
        smooth(Args(base, tmp_path / "x", texts=tmp_path / "empty.txt"))
    assert not (tmp_path / "x").exists() and not (tmp_path / "again").exists()


def test_texts_decide(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = ConvertedFolder(folders[0])
    one, other = (find_exponents(base, texts) for texts in (TEXTS[:1], TEXTS))
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="does not know what to do"):
        scaled("language_model.layers.0.self_attn.new", np.zeros(2), one)


@pytest.mark.slow
def test_real_weights(smollm2_converted: Path, sts_data: Path, tmp_path: Path) -> None:
    """64 sentences of SmolLM2, by the default sentences; and how far off int8 is without."""
    smooth(Args(smollm2_converted, tmp_path / "smooth"))
    with (sts_data / "STS" / "STSBenchmark" / "sts-test.csv").open() as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = sorted({row[5] for row in rows})[:64]
    exact = E5V.from_pretrained(smollm2_converted, dtype="float32").encode(texts)
    before, after = (
        (E5V.from_pretrained(x, dtype="float32", quantize="int8").encode(texts) * exact).sum(axis=1)
        for x in (smollm2_converted, tmp_path / "smooth")
    )
    for cosine in (before, after):
        print(f"cosine: mean {cosine.mean():.5f}, least {cosine.min():.5f}")
    assert after.mean() >= 0.9995 and after.min() >= 0.998
    assert 1 - after.mean() < 0.7 * (1 - before.mean())
