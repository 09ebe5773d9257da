"""Alignment on captions: its step against transformers and peft, whole runs, and bad data."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flax import nnx
from hf_models import RECIPES, Case, Recipe, build_llava, picture, prompt_of
from peft import PeftModel
from training_runs import ROOT, assert_same_state, command, make_folder, read_metrics, write_csv
from transformers import get_linear_schedule_with_warmup

from e5v_jax import E5V
from e5v_jax.align.__main__ import main
from e5v_jax.align.captions import load_captions
from e5v_jax.align.config import (
    AlignConfig,
    AlignOptimizerConfig,
    CaptionEvaluationConfig,
    CaptionsConfig,
)
from e5v_jax.align.loss import CaptionBatch, caption_loss, caption_sums
from e5v_jax.align.task import align, set_up
from e5v_jax.align.validation import CaptionValidation
from e5v_jax.checkpoints import from_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import dotted
from e5v_jax.checkpoints.peft import Adapter, write_adapter
from e5v_jax.dryrun.__main__ import main as dryrun
from e5v_jax.dryrun.program import Target, align_program
from e5v_jax.families.base import BatchShape
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.config import DataConfig, TrainConfig
from e5v_jax.train.feed import HostBatch
from e5v_jax.train.loop import train
from e5v_jax.train.setup import Training

RECIPE = Recipe(
    text={"num_hidden_layers": 2, "vocab_size": 264},
    vision={"num_hidden_layers": 2},
    pinpoints=((1, 2), (2, 1)),
    tied=True,
    seed=40,
)
ROWS, BATCH, STEPS = 8, 4, 10
SIZES = [(30, 60), (60, 30), (28, 28), (50, 47)]
LORA = LoRAConfig(rank=2, alpha=4.0)
LORA_AT = "language_model.layers."


def caption(row: int, number: int) -> str:
    return ["a red dog", "two cats on a roof", "snow"][(row + number) % 3] + " again" * (row % 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("align"))


def fill(folder: Path) -> Path:
    """Put a converted model and the same images, as a folder and as a Parquet file, there."""
    build_llava(RECIPE, folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "base"))
    photos = folder / "photos"
    photos.mkdir()
    rows = []
    for i in range(ROWS):
        picture(*SIZES[i % len(SIZES)], seed=i).save(photos / f"{i}.png")
        rows.append({"image": f"{i}.png", "captions": [caption(i, j) for j in range(3)]})
    (photos / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {
        "id": list(range(ROWS)),
        "image": [(photos / str(row["image"])).read_bytes() for row in rows],
        "captions": [row["captions"] for row in rows],
    }
    pq.write_table(pa.table(columns), folder / "photos.parquet", row_group_size=3)
    return folder


def config(folder: Path, output: Path, **changes: Any) -> AlignConfig:
    cfg = AlignConfig(
        model=folder / "base",
        output=output,
        data=CaptionsConfig(path=(folder / "photos",)),
        optimizer=AlignOptimizerConfig(learning_rate=0.02, warmup_steps=2),
        batch_size=BATCH,
        num_epochs=STEPS * BATCH // ROWS,
        dtype="float32",
        remat="none",
        log_every=1,
        checkpoint_every=4,
    )
    return dataclasses.replace(cfg, **changes)


def training_of(cfg: AlignConfig) -> Training:
    return set_up(cfg, ConvertedFolder(cfg.model), load_captions(cfg.data.path))


def flat(state: nnx.State) -> dict[str, np.ndarray]:
    return {dotted(path): np.array(x[...]) for path, x in nnx.to_flat_state(state)}


def caption_of(tokenizer: Any, labels: np.ndarray) -> str:
    """What labels say, its end included; the tokenizer's tokens are bytes."""
    return "".join(tokenizer.convert_ids_to_tokens(labels[labels >= 0])).replace("Ġ", " ")


# --- against torch and peft ---


def torch_batch(case: Case, rows: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Transformers' own batch of prompts with the captions that we chose, by their tokens."""
    texts, images = [], []
    for row, own in zip(rows, labels, strict=True):
        image = picture(*SIZES[row % len(SIZES)], seed=row)
        prompt, _ = prompt_of(image, case.template)
        texts.append(prompt + caption_of(case.tokenizer, own))
        images.append(image)
    batch = dict(
        case.processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side="right"
        )
    )
    batch.pop("token_type_ids", None)
    target = torch.full_like(batch["input_ids"], -100)
    for i, own in enumerate(labels):
        n, end = int((own >= 0).sum()), int(batch["attention_mask"][i].sum())
        target[i, end - n : end] = torch.tensor(own[:n])
    return {**batch, "labels": target}


@pytest.mark.parametrize("kind", ["projector", "lora", "decoder"])
def test_ten_steps_follow_transformers(folder: Path, tmp_path: Path, kind: str) -> None:
    cfg = config(
        folder,
        tmp_path / "run",
        lora=LORA if kind == "lora" else None,
        train="decoder" if kind == "decoder" else "projector",
        optimizer=AlignOptimizerConfig(
            learning_rate=0.02,
            warmup_steps=2,
            weight_decay=0.1,
            decoder_learning_rate=None if kind == "projector" else 0.005,
        ),
    )
    training = training_of(cfg)
    start = flat(training.trainable)
    case = build_llava(RECIPE, tmp_path / "again")
    model: Any = case.torch_model
    for p in model.parameters():
        p.requires_grad = False
    connector = [*model.model.multi_modal_projector.parameters(), model.model.image_newline]
    decoder: list[Any] = []
    if kind == "lora":
        factors = {name: x for name, x in start.items() if name.startswith(LORA_AT)}
        write_adapter(
            tmp_path / "adapter", Adapter(LORA, factors), ConvertedFolder(cfg.model).table
        )
        model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
        decoder = [p for p in model.parameters() if p.requires_grad]
    elif kind == "decoder":
        decoder = list(model.model.language_model.parameters())
    for p in (*connector, *decoder):
        p.requires_grad = True
    groups = [{"params": connector}, {"params": decoder, "lr": 0.005}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    losses = []
    for step in range(STEPS):
        batch = next(training.feed.batches)
        theirs = model(**torch_batch(case, batch.rows, batch.arrays.labels))
        optimizer.zero_grad()
        theirs.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*connector, *decoder], 1.0)
        optimizer.step()
        schedule.step()
        metrics = training.step(batch, jax.random.key(step))
        assert float(metrics.loss) == pytest.approx(
            theirs.loss.item(), abs=1e-5 if not step else 1e-4
        )
        assert float(metrics.grad_norm) == pytest.approx(norm.item(), rel=1e-3)
        losses.append(theirs.loss.item())
    assert losses[-1] < losses[0] - 0.1  # it learns, so that ten models are compared
    moved = {name: np.abs(x - start[name]).max() for name, x in flat(training.trainable).items()}
    assert min(moved.values()) > 0.001
    connectors = {name for name in moved if not name.startswith("language_model.")}
    assert len(connectors) == 5
    assert len(moved) - len(connectors) == {"projector": 0, "lora": 14, "decoder": 11}[kind]
    newline = flat(training.trainable)["image_newline"]
    assert np.abs(newline - connector[-1].detach().numpy()).max() <= 1e-5


@pytest.mark.parametrize("remat", ["none", "full"])
def test_chunks_have_the_gradient_of_the_whole(folder: Path, tmp_path: Path, remat: Any) -> None:
    """Loss, accuracy and gradient, though rows have different numbers of labels."""
    training = training_of(config(folder, tmp_path / "run", lora=LORA))
    batch = next(training.feed.batches).arrays
    assert len({int(n) for n in (batch.labels >= 0).sum(axis=1)}) > 1

    def run(chunk_size: int | None, remat: Any) -> Any:
        def loss(trainable: nnx.State) -> Any:
            model = nnx.merge(training.graphdef, trainable, training.frozen)
            return caption_loss(model, batch, None, chunk_size=chunk_size, remat=remat)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(training.trainable)

    (whole, accuracy), gradient = run(None, "none")
    (chunked, also), other = run(1 if remat == "full" else 2, remat)
    assert float(chunked) == pytest.approx(float(whole), rel=1e-6)
    assert float(also) == pytest.approx(float(accuracy), rel=1e-6)
    norm = float(np.sqrt(sum((x**2).sum() for x in flat(gradient).values())))
    theirs = flat(other)
    for name, x in flat(gradient).items():
        assert np.abs(x - theirs[name]).max() <= 1e-6 * norm, name


def test_packed_captions_have_the_gradient_of_rows_of_their_own(
    folder: Path, tmp_path: Path
) -> None:
    """Loss, accuracy and gradient of images with all captions, against a row for each caption."""
    packed = config(folder, tmp_path, lora=LORA, data=_captions(folder, "all"), batch_size=2)
    training = training_of(packed)
    batch = next(training.feed.batches)
    arrays = batch.arrays
    assert arrays.labels.shape[1] > 3 * 5 and arrays.packing is not None
    # captions[0..2] of each image, as an epoch of one caption each shows them
    alone = training_of(dataclasses.replace(packed, data=_captions(folder, "one"), batch_size=ROWS))
    shown = [next(alone.feed.batches) for _ in range(3)]

    def run(parts: list[CaptionBatch]) -> Any:
        def loss(trainable: nnx.State) -> Any:
            model = nnx.merge(training.graphdef, trainable, training.frozen)
            sums = [caption_sums(model, part, None, chunk_size=None, remat="none")
                    for part in parts]  # fmt: skip
            count = sum(part.labels for part in sums)
            return sum(part.loss for part in sums) / count, sum(part.right for part in sums) / count

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(training.trainable)

    def only(step: HostBatch, row: int) -> CaptionBatch:
        """The labels of all other rows left out."""
        own = np.isin(step.rows, [row])[:, None]
        return step.arrays._replace(labels=np.where(own, step.arrays.labels, -1))

    (together, right), gradient = run([arrays])
    parts = [only(step, int(row)) for step in shown for row in batch.rows]
    (apart, also), other = run(parts)
    assert float(together) == pytest.approx(float(apart), rel=1e-6)
    assert float(right) == pytest.approx(float(also), rel=1e-6)
    theirs = flat(other)
    norm = float(np.sqrt(sum((x**2).sum() for x in theirs.values())))
    for name, x in flat(gradient).items():
        assert np.abs(x - theirs[name]).max() <= 1e-6 * norm, name


# --- data ---


def _captions(folder: Path, captions: Any) -> CaptionsConfig:
    return CaptionsConfig(path=(folder / "photos",), captions=captions)


def test_folders_and_parquet_give_the_same_steps(folder: Path, tmp_path: Path) -> None:
    ours, theirs = (
        list(training_of(config(folder, tmp_path, data=CaptionsConfig(path=(path,)))).feed.batches)
        for path in (folder / "photos", folder / "photos.parquet")
    )
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(jax.tree.leaves(a.arrays), jax.tree.leaves(b.arrays), strict=True):
            assert np.array_equal(x, y)


def test_captions_are_shown_in_turn_or_all(folder: Path, tmp_path: Path) -> None:
    def seen(captions: Any, epochs: int) -> list[list[tuple[int, str]]]:
        data = _captions(folder, captions)
        training = training_of(config(folder, tmp_path, data=data, num_epochs=epochs))
        tokenizer = training.processor.tokenizer
        return [
            [(int(row), caption_of(tokenizer, own)) for row, own in
             zip(batch.rows, batch.arrays.labels, strict=True)]
            for batch in training.feed.batches
        ]  # fmt: skip

    ended = [[f"{caption(i, j)}<|eot_id|>" for j in range(3)] for i in range(ROWS)]
    expected = {(i, text) for i, own in enumerate(ended) for text in own}
    shown = seen("one", 3)
    assert len(shown) == 3 * ROWS // BATCH and {x for step in shown for x in step} == expected
    shown = seen("all", 1)
    assert len(shown) == ROWS // BATCH
    assert {x for step in shown for x in step} == {(i, "".join(x)) for i, x in enumerate(ended)}


def test_every_choice_changes_the_batch(folder: Path, tmp_path: Path) -> None:
    def first(**changes: Any) -> Any:
        data = CaptionsConfig(path=(folder / "photos",), **changes)
        return next(training_of(config(folder, tmp_path, data=data)).feed.batches).arrays

    plain, cut, ended = first(), first(max_tokens=5), first(end="</s>")
    assert cut.labels.shape == (BATCH, 5)
    assert np.array_equal(cut.labels[:, :4], plain.labels[:, :4])
    changed = plain.labels != ended.labels
    assert changed.sum() == BATCH and (ended.labels[changed] == 257).all()
    prompt = first(prompt="<image>\nWhat is it?").inputs
    assert not np.array_equal(prompt.last_index, plain.inputs.last_index)
    assert not np.array_equal(first(template="vicuna").inputs.last_index, plain.inputs.last_index)


@pytest.mark.parametrize("captions", ["one", "all"])
def test_the_dry_run_compiles_the_real_step(folder: Path, tmp_path: Path, captions: Any) -> None:
    """Shapes and dtypes of all that the step gets, with features of images and without."""
    kept: list[Path | None] = [None, tmp_path / "features"]
    for features in kept:
        data = dataclasses.replace(_captions(folder, captions), features=features)
        cfg = config(folder, tmp_path, lora=LORA, data=data)
        training = training_of(cfg)
        batch = next(training.feed.batches).arrays
        base = ConvertedFolder(cfg.model)
        tiles = len(batch.inputs.tiles) // BATCH
        shape = BatchShape(BATCH, batch.inputs.input_ids.shape[1], tiles)
        target = Target(base.family, base.config, training.runtime)
        program = align_program(cfg, target, shape, batch.labels.shape[1])
        state = (training.trainable, training.opt_state, training.frozen)
        real = (*state, batch, jax.random.key(0))
        assert _shapes(program.args) == _shapes(real)
        assert program.trace().jaxpr.out_avals[-4].shape == ()  # the loss


def _shapes(tree: Any) -> list[tuple[str, tuple[int, ...], str]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in found]


def test_the_dry_run_is_a_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", "--model", str(folder / "base"), "--image-size", "28", "28", "--json",
             "--batch-size", "4", "--dtype", "float32", "--topology"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        dryrun([*words, "cpu"])
    assert not done.value.code
    report = json.loads(capsys.readouterr().out)
    assert report["program"].startswith("alignment step (projector, 4 images")
    assert (
        report["useful_flops"] > 0 and report["memory"]["peak"] > report["memory"]["parameters"] > 0
    )
    with pytest.raises(SystemExit) as error:
        dryrun([*words, "gpu:h100:1"])
    assert error.value.code == 1
    assert "compiled, not estimated" in capsys.readouterr().err


# --- whole runs ---


def test_features_are_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps, from a folder or a Parquet file; then no image is decoded any more."""
    kept = tmp_path / "features"
    data = CaptionsConfig(path=(folder / "photos",), features=kept)
    evaluation = CaptionEvaluationConfig(data=folder / "photos.parquet")

    def losses(*, validates: bool = True, **changes: Any) -> list[float]:
        cfg = config(folder, tmp_path / "out", evaluation=evaluation, **changes)
        training, found = training_of(cfg), []
        validation = CaptionValidation(cfg, training) if validates else None
        for _ in range(3):
            metrics = training.step(next(training.feed.batches), jax.random.key(0))
            found.append(float(metrics.loss))
        if validation is None:
            return found
        scores = validation.score(training.trainable, training.frozen)
        assert list(scores) == ["dev_loss", "dev_recall@1", "dev_recall@10"]
        return [*found, *scores.values()]

    expected = losses()
    np.testing.assert_allclose(losses(data=data), expected, atol=1e-6)
    assert len(list(kept.rglob("*.npy"))) == ROWS
    monkeypatch.setattr("e5v_jax.families.llava_next.processor.load_image", None)
    np.testing.assert_allclose(losses(validates=False, data=data), expected[:3], atol=1e-6)
    with pytest.raises(TypeError):  # with another dtype they are others
        losses(validates=False, data=data, dtype="bfloat16")


def run_config(folder: Path, output: Path) -> AlignConfig:
    """A run with dropout, chunks, accumulation and a validation."""
    return config(
        folder,
        output,
        lora=dataclasses.replace(LORA, dropout=0.1),
        chunk_size=2,
        optimizer=AlignOptimizerConfig(learning_rate=0.02, warmup_steps=1, accumulate_steps=2),
        evaluation=CaptionEvaluationConfig(folder / "photos.parquet", stride=3),
    )


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    align(run_config(folder, folder / "run"))
    return folder / "run"


def test_a_run_learns_and_is_validated(finished: Path) -> None:
    lines = read_metrics(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(0 <= line["accuracy"] <= 1 and line["captions_per_s"] > 0 for line in steps)
    scores = {line["step"]: line["dev_loss"] for line in lines if "dev_loss" in line}
    assert list(scores) == [4, 8, STEPS]
    assert scores[STEPS] < scores[4]
    info = json.loads((finished / "run.json").read_text())
    assert info["command"] == "align" and info["config"]["train"] == "projector"


def test_the_model_goes_on(folder: Path, finished: Path, tmp_path: Path) -> None:
    """The aligned model is the best checkpoint, LoRA merged; it embeds and is trained on."""
    from orbax.checkpoint import v1 as ocp

    scores = {x["dev_loss"]: int(x["step"]) for x in read_metrics(finished) if "dev_loss" in x}
    best = scores[min(scores)]
    with ocp.training.Checkpointer(finished / "checkpoints") as checkpointer:
        trained = checkpointer.load(best)["trainable"]
    base, model = ConvertedFolder(folder / "base"), ConvertedFolder(finished / "model", verify=True)

    def read(source: ConvertedFolder, name: str) -> np.ndarray:
        return next(source.read([name]))

    for part in ("linear_1", "linear_2"):
        kernel = np.asarray(trained["multi_modal_projector"][part]["kernel"]["value"])
        name = f"multi_modal_projector.{part}.kernel"
        assert np.array_equal(read(model, name), kernel)
        assert not np.array_equal(read(base, name), kernel)
    own = trained["language_model"]["layers"]["mlp"]["up_proj"]
    name = "language_model.layers.1.mlp.up_proj.kernel"
    delta = (
        LORA.scale * np.asarray(own["lora_a"]["value"])[1] @ np.asarray(own["lora_b"]["value"])[1]
    )
    assert np.abs(delta).max() > 1e-3
    assert np.abs(read(model, name) - read(base, name) - delta).max() <= 1e-6
    names = [name for name in base.shapes() if name.startswith("vision_tower.")]
    assert all(np.array_equal(read(model, name), read(base, name)) for name in names)

    images = [folder / "photos" / f"{i}.png" for i in range(2)]
    before, after = (
        E5V.from_pretrained(x.folder, dtype="float32").encode(images) for x in (base, model)
    )
    assert np.abs(before - after).max() > 1e-3
    (tmp_path / "pairs.csv").write_text("sent0,sent1,hard_neg\na,b,c\nd,e,f\n")
    data = DataConfig(path=(tmp_path / "pairs.csv",))
    train(
        TrainConfig(finished / "model", tmp_path / "run", data=data, lora=LORA, batch_size=2,
                    max_steps=1, dtype="float32")
    )  # fmt: skip
    assert (tmp_path / "run" / "adapter").is_dir()
    with pytest.raises(ValueError, match=r"a run of align leaves a model .* use .*run/model"):
        E5V.from_pretrained(folder / "base", adapter=finished)


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(folder: Path, finished: Path, tmp_path: Path) -> None:
    cfg = run_config(folder, tmp_path / "run")
    file = tmp_path / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom test_align import run_config\n"
        f"def get_config():\n    return run_config(Path({str(folder)!r}), Path('unused'))\n"
    )
    done = command(
        ["--config", str(file), "--output", str(cfg.output)],
        module="e5v_jax.align",
        cache=tmp_path / "cache",
        signal_at=("os.rename", "/8.orbax-checkpoint-tmp"),  # written, but not yet whole
        env={"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = sorted(int(x.name) for x in (cfg.output / "checkpoints").iterdir() if x.name.isdigit())
    assert found == [4] and not (cfg.output / "model").exists()
    align(dataclasses.replace(cfg, resume=True))
    assert_same_state(cfg.output, finished, STEPS)
    ours, theirs = (x / "model" / "config.json" for x in (cfg.output, finished))
    assert ours.read_bytes() == theirs.read_bytes()  # the hash of all weights is in it

    for changes, message in [
        ({"train": "decoder", "lora": None}, "lora was .* and is now None"),
        ({"data": dataclasses.replace(cfg.data, captions="all")}, "data.captions was one and is"),
    ]:
        with pytest.raises(ValueError, match=f"cannot resume: {message}"):
            align(dataclasses.replace(cfg, resume=True, **changes))
    with pytest.raises(ValueError, match="cannot resume: it is a run of align, not of train"):
        data = DataConfig(path=(write_csv(tmp_path / "data.csv"),))
        train(TrainConfig(folder / "base", cfg.output, data=data, resume=True))


# --- bad input: one line, and no run folder ---


def refuse(cfg: AlignConfig, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as info:
        align(cfg)
    assert not cfg.output.exists()
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"image": "none.png"}, FileNotFoundError, ["captions.jsonl, row 2", "'none.png' not"]),
        ({"image": "notes.txt"}, ValueError, ["captions.jsonl: notes.txt: ", "not an image"]),
        ({"captions": []}, ValueError, ["captions.jsonl, row 2: captions []"]),
        ({"captions": ["a dog", " "]}, ValueError, ["captions.jsonl, row 2: captions ["]),
        ({"captions": ["an <image>"]}, ValueError, ["captions.jsonl: b.png: caption 'an <image>'"]),
        ({"captions": ["dog " * 2000]}, ValueError, ["captions.jsonl: b.png: ", "at most 2048"]),
    ],
    ids=["missing", "no-image", "none", "empty", "token", "long"],
)
def test_bad_folders(
    folder: Path, tmp_path: Path, change: dict[str, object], error: type[Exception],
    expected: list[str],
) -> None:  # fmt: skip
    lines = []
    for name in ("a.png", "b.png"):
        picture(28, 28, seed=len(lines)).save(tmp_path / name)
        lines.append({"image": name, "captions": ["a dog"]})
    (tmp_path / "notes.txt").write_text("no image")
    lines[1] |= change
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = CaptionsConfig(path=(tmp_path,), max_tokens=10**6)
    line = refuse(config(folder, tmp_path / "run", data=data), error)
    assert line.startswith(str(tmp_path)) and all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": [b"1"]}, ": no column captions; found ['image']"),
        ({"image": [3], "captions": [["a"]]}, ":1: column image is int, expected an encoded image"),
        ({"image": [b""], "captions": [["a"]]}, ":1: column image is empty"),
        ({"image": [b"1"], "captions": [5]}, ":1: column captions is 5, expected texts"),
        ({"image": [b"1"], "captions": [["a", ""]]}, ':1: a caption is "", expected a text'),
        ({"image": [b"1"], "captions": [["a"]]}, ":1: image bytes (1 bytes): not an image"),
        ({"image": [], "captions": []}, ": no rows"),
    ],
)
def test_bad_parquet(
    folder: Path, tmp_path: Path, columns: dict[str, list[Any]], expected: str
) -> None:
    file = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), file)
    data = CaptionsConfig(path=(file,))
    assert refuse(config(folder, tmp_path / "run", data=data)).startswith(f"{file}{expected}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": CaptionsConfig()}, "data.path: none given"),
        ({"data": {"path": (Path("a.txt"), )}}, "a.txt: no such file"),
        ({"data": {"prompt": "What is it?"}}, "data.prompt: 'What is it?', expected one with <im"),
        ({"data": {"end": "<none>"}}, "data.end: '<none>' is no token of this model"),
        ({"data": {"template": "none"}}, "unknown template 'none'"),
        ({"data": {"max_tokens": 0}}, "data.max_tokens: 0, expected at least 1"),
        ({"optimizer": AlignOptimizerConfig(decoder_learning_rate=2.0)}, "optimizer.decoder_learn"),
        ({"chunk_size": 3}, "batch_size: 4 images of a step cannot be split into parts of 3"),
        ({"train": "decoder", "lora": LORA}, "lora: is for a frozen decoder"),
        ({"train": "decoder", "quantize": "int8"}, "quantize: is for a frozen decoder"),
        ({"projector_start": "words"}, "projector_start words: needs data.features"),
        ({"batch_size": 16}, "8 rows with 8 different image do not fill a batch of 16"),
    ],
)  # fmt: skip
def test_bad_settings(folder: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    cfg = config(folder, tmp_path / "run")
    if isinstance(data := changes.get("data"), dict):
        changes = {"data": dataclasses.replace(cfg.data, **data)}
    error = FileNotFoundError if "no such file" in expected else ValueError
    assert refuse(dataclasses.replace(cfg, **changes), error).startswith(expected)


def test_models_that_cannot_be_aligned(
    folder: Path, tmp_path: Path, llava: Callable[[str], Case]
) -> None:
    text = make_folder(tmp_path)
    line = refuse(config(folder, tmp_path / "run", model=text / "base"))
    assert line.endswith("a model of type llama has no images: there is nothing to align")
    case = llava("llama-gqa")
    assert not RECIPES["llama-gqa"].tied
    from_hf.convert(from_hf.Args(str(case.folder), tmp_path / "untied"))
    line = refuse(config(folder, tmp_path / "run", model=tmp_path / "untied"))
    assert "by an lm_head of its own" in line


def test_help_tells_what_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for flag in ("--data.captions", "--optimizer.decoder-learning-rate", "--train", "--mesh.fsdp",
                 "--evaluation.stride", "--resume", "--quantize"):  # fmt: skip
        assert flag in out
    assert "--loss" not in out
