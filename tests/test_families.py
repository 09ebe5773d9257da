"""What every model can do, on Qwen-VL: training, peft's adapters, files, benchmarks, dry runs.

Parity, conversion and images of all shapes have tests of each family's own.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mteb
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from hf_models import picture
from qwen2_models import OldRecipe, build_old
from qwen_models import QwenCase, QwenRecipe, build_qwen3_vl
from test_mteb import make_task
from training_runs import STEPS, assert_same_end, config, read_metrics, write_csv
from transformers import AutoModelForImageTextToText

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.data.pairs import load_pairs
from e5v_jax.data.text import truncate_texts
from e5v_jax.dryrun import flops
from e5v_jax.dryrun.__main__ import main as dryrun_main
from e5v_jax.dryrun.program import Target, encode_program, train_program
from e5v_jax.encode.__main__ import main as encode_main
from e5v_jax.encode.bulk import read_embeddings
from e5v_jax.evaluate.__main__ import main as evaluate_main
from e5v_jax.families import architectures
from e5v_jax.families.base import BatchShape
from e5v_jax.integrations.mteb import MtebEncoder
from e5v_jax.nn.layers import LoRAConfig, Precision, l2_normalize
from e5v_jax.nn.quantized import Quantization
from e5v_jax.presets import E5_V
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.config import DataConfig, TrainConfig
from e5v_jax.train.feed import load_data, open_feed, place
from e5v_jax.train.loop import train
from e5v_jax.train.setup import set_up
from e5v_jax.train.step import PairBatch, embed_pairs

_TEXT = {"num_hidden_layers": 2, "vocab_size": 263, "intermediate_size": 128}
BUILDERS: dict[str, Callable[[Path], QwenCase]] = {
    "qwen3-vl": lambda folder: build_qwen3_vl(
        QwenRecipe(_TEXT, {"depth": 2, "deepstack_visual_indexes": [0]}, seed=61), folder
    ),
    "qwen2.5-vl": lambda folder: build_old(
        OldRecipe("qwen2_5_vl", _TEXT, {"depth": 2, "fullatt_block_indexes": [1]}, seed=62), folder
    ),
}
_OTHERS: dict[str, Callable[[Path], QwenCase]] = {
    "qwen2-vl": lambda folder: build_old(
        OldRecipe("qwen2_vl", _TEXT, {"depth": 2}, seed=63), folder
    )
}
ITEMS: list[Any] = [
    "a dog runs",
    picture(30, 50),
    {"text": "now red", "image": picture(28, 60, seed=1)},
]
SIZES = [(30, 60), (28, 28), (88, 80), (12, 90)]  # of two buckets
LORA = LoRAConfig(rank=2, alpha=4.0)


@dataclass(frozen=True)
class Place:
    """A folder with ``hf``, ``base`` (converted), ``data.csv``, photographs and their rows."""

    folder: Path
    case: QwenCase

    def e5v(self, **options: Any) -> E5V:
        return E5V.from_pretrained(self.folder / "base", dtype="float32", **options)

    def torch(self) -> Any:
        """A fresh model of transformers."""
        path = self.folder / "hf"
        return AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()

    def torch_embed(self, model: Any) -> np.ndarray:
        """What that or peft's model makes of ``ITEMS``."""
        base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        return type(self.case)(self.case.folder, base).torch_embed(ITEMS)


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    def make(name: str) -> Place:
        folder = tmp_path_factory.mktemp(name)
        case = (BUILDERS | _OTHERS)[name](folder / "hf")
        from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "base"))
        write_csv(folder / "data.csv")
        (folder / "photos").mkdir()
        captions, pairs = [], []
        for i, size in enumerate(SIZES):
            picture(*size, seed=i).save(folder / "photos" / f"{i}.png")
            captions.append({"image": f"{i}.png", "captions": [f"picture {i}", f"number {i}"]})
        for i in range(9):
            pairs.append({"image0": f"{i % len(SIZES)}.png", "sent1": f"dog {i} runs"})
        for name_, rows in (("captions", captions), ("pairs", pairs)):
            lines = "\n".join(map(json.dumps, rows))
            (folder / "photos" / f"{name_}.jsonl").write_text(lines + "\n")
        return Place(folder, case)

    return cache(make)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("qwen3-vl", None),
        pytest.param("qwen2.5-vl", "nf4", marks=pytest.mark.slow),
        pytest.param("qwen2-vl", None, marks=pytest.mark.slow),
    ],
)
def test_training_on_texts(
    name: str, quantize: Quantization | None, at: Callable[[str], Place], tmp_path: Path
) -> None:
    """It learns, resumes to the same bits, and its adapter embeds images as peft's model does."""
    found = at(name)
    cfg = config(found.folder, tmp_path / "run", lora=LORA, quantize=quantize)
    train(cfg)
    losses = [line["loss"] for line in read_metrics(cfg.output)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    kept = shutil.copytree(cfg.output, tmp_path / "kept")
    shutil.rmtree(cfg.output / "checkpoints" / str(STEPS))
    train(replace(cfg, resume=True))
    assert_same_end(cfg.output, kept, STEPS)

    peft_folder = tmp_path / "peft"
    args = to_hf.Args(found.folder / "base", peft_folder, adapter=cfg.output, peft=True)
    to_hf.convert(args)
    expected = found.torch_embed(peft.PeftModel.from_pretrained(found.torch(), peft_folder))
    assert np.abs(expected - found.torch_embed(found.torch())).max(axis=1).min() > 1e-2
    for adapter in (cfg.output, peft_folder):
        vectors = found.e5v(adapter=adapter).encode(ITEMS)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_chunks_of_texts(at: Callable[[str], Place], tmp_path: Path) -> None:
    """The losses are those without gradient caching; the tower takes no part."""
    found, losses = at("qwen3-vl"), []
    for chunk_size in (None, 4):
        cfg = config(found.folder, tmp_path / str(chunk_size), lora=LORA, chunk_size=chunk_size)
        train(cfg)
        losses.append([line["loss"] for line in read_metrics(cfg.output)])
    np.testing.assert_allclose(*losses, rtol=1e-6)
    training = set_up(cfg, ConvertedFolder(cfg.model), load_data(cfg.data))
    states = (training.frozen, training.trainable)
    assert {path[0] for x in states for path, _ in nnx.to_flat_state(x)} == {"language_model"}


@pytest.mark.parametrize("name", BUILDERS)
def test_vectors_of_pairs_are_those_of_encode(name: str, at: Callable[[str], Place]) -> None:
    """Images of different buckets share a group of the largest one's patches, here in chunks."""
    found = at(name)
    e5v, file = found.e5v(), found.folder / "photos" / "pairs.jsonl"
    mesh = make_mesh(data=-1, fsdp=1)
    cfg = TrainConfig(model=found.folder, output=Path("unused"), batch_size=len(SIZES))
    feed = open_feed(cfg, load_pairs(file), e5v.processor, Runtime.on(mesh))
    batch = next(feed.batches)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    inputs = [file.parent / rows[i]["image0"] for i in batch.rows]
    buckets = {item.shape_key for item in e5v.processor.measure(inputs, E5_V.choose())}
    assert len(buckets) == 2 and feed.has_images

    def embed(model: Any, batch: PairBatch) -> jax.Array:
        return embed_pairs(model, batch, chunk_size=2, remat="none", dropout_key=None)

    vectors = nnx.jit(embed)(found.case.module, place(batch.arrays, mesh))
    # the test's tokenizer has no decoder, so that decoding changes the text
    texts = truncate_texts(e5v.tokenizer, [rows[i]["sent1"] for i in batch.rows])
    expected = e5v.encode([*inputs, *texts])
    np.testing.assert_allclose(l2_normalize(vectors), expected, atol=1e-5)


@pytest.mark.slow
def test_training_on_images(at: Callable[[str], Place], tmp_path: Path) -> None:
    """Images of different sizes, two at a time: it learns."""
    found = at("qwen3-vl")
    data = DataConfig(path=(found.folder / "photos" / "pairs.jsonl",), max_pixels=48**2)
    cfg = config(found.folder, tmp_path / "run", lora=LORA, batch_size=4, data=data)
    train(replace(cfg, chunk_size=2, num_epochs=4))
    losses = [line["loss"] for line in read_metrics(cfg.output)]
    base = ConvertedFolder(cfg.model)
    training = set_up(cfg, base, load_data(data))
    most = max(item.length for item in training.processor.measure([picture(88, 80)], E5_V.choose()))
    assert training.feed.lengths[-1] == training.processor.padded_length(most, 64)
    assert len(losses) == 8 and np.mean(losses[-3:]) < np.mean(losses[:3])


# --- adapters ------------------------------------------------------------------------------------

DECODER = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_peft(found: Place, folder: Path, targets: str | list[str]) -> peft.PeftModel:
    """A random adapter on transformers' model, saved to ``folder``."""
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    model = peft.get_peft_model(found.torch(), options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_of_peft(name: str, at: Callable[[str], Place], tmp_path: Path) -> None:
    """Applied, merged at conversion, carried along and written again: peft's own vectors."""
    found, adapter = at(name), tmp_path / "adapter"
    # in Qwen3-VL's tower no module has a name of the decoder's
    model = make_peft(found, adapter, SEVEN if name == "qwen3-vl" else DECODER)
    expected = found.torch_embed(model)
    np.testing.assert_allclose(found.e5v(adapter=adapter).encode(ITEMS), expected, atol=1e-5)
    for merge in (True, False):
        ours, back = tmp_path / f"ours-{merge}", tmp_path / f"back-{merge}"
        source = str(found.folder / "hf")
        from_hf.convert(from_hf.Args(source, ours, adapter=adapter, merge=merge))
        to_hf.convert(to_hf.Args(ours, back, peft=not merge))
        again = (
            AutoModelForImageTextToText.from_pretrained(back, attn_implementation="eager").eval()
            if merge
            else peft.PeftModel.from_pretrained(found.torch(), back)
        )
        np.testing.assert_allclose(found.torch_embed(again), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets", "module"),
    [
        ("qwen3-vl", "all-linear", "attn.proj"),
        ("qwen2.5-vl", SEVEN, "mlp.down_proj"),  # its tower has modules of the same names
    ],
)
def test_adapters_of_the_tower(
    name: str, targets: Any, module: str, at: Callable[[str], Place], tmp_path: Path
) -> None:
    """They are refused by the first one's name, and merged where peft is."""
    found, adapter = at(name), tmp_path / "adapter"
    model = make_peft(found, adapter, targets)
    for options in ({}, {"merge": True}):
        with pytest.raises(ValueError, match=r"decoder's linear maps .*merge_and_unload") as info:
            args = from_hf.Args(
                str(found.folder / "hf"), tmp_path / "x", adapter=adapter, **options
            )
            from_hf.convert(args)
        assert f"visual.blocks.0.{module}.lora_A.weight" in str(info.value)
        assert "\n" not in str(info.value) and not (tmp_path / "x").exists()
    expected = found.torch_embed(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found.case.tokenizer.save_pretrained(tmp_path / "merged")
    from_hf.convert(from_hf.Args(str(tmp_path / "merged"), tmp_path / "x"))
    e5v = E5V.from_pretrained(tmp_path / "x", dtype="float32")
    np.testing.assert_allclose(e5v.encode(ITEMS), expected, atol=1e-5)


# --- commands ------------------------------------------------------------------------------------


def run(main: Callable[[list[str]], None], *words: object) -> None:
    """A command in this process; it must end well."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code


def test_commands(
    at: Callable[[str], Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Encode and evaluate with a model that is loaded once, and mteb."""
    found = at("qwen3-vl")
    e5v, base, photos = found.e5v(), found.folder / "base", found.folder / "photos"
    monkeypatch.setattr(E5V, "from_pretrained", lambda *_, **__: e5v)
    files = [photos / f"{i}.png" for i in range(len(SIZES))]
    model = ("--model", base, "--dtype", "float32")
    assert pickle.loads(pickle.dumps(e5v.processor.load)) is not None  # to a worker

    words = ["--text", "a dog", "--image", files[0], "--truncate-dim", 16]
    run(encode_main, *model, *words, "--output", tmp_path / "few.npy")
    expected = e5v.encode(["a dog", files[0]], truncate_dim=16)
    np.testing.assert_allclose(np.load(tmp_path / "few.npy"), expected, atol=1e-6)
    run(encode_main, *model, "--input", photos, "--output", tmp_path / "many")
    ids, vectors = read_embeddings(tmp_path / "many")
    assert ids == [file.name for file in files]
    np.testing.assert_allclose(vectors, e5v.encode(files), atol=1e-6)
    rows = [{"text": "a dog"}, {"image": "2.png"}, {"text": "now red", "image": "3.png"}]
    (photos / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(encode_main, *model, "--input", photos / "rows.jsonl", "--output", tmp_path / "rows")
    expected = e5v.encode(["a dog", files[2], {"text": "now red", "image": files[3]}])
    np.testing.assert_allclose(read_embeddings(tmp_path / "rows")[1], expected, atol=1e-6)

    sts = tmp_path / "STS" / "STSBenchmark"
    sts.mkdir(parents=True)
    lines = [f"m\tu\t2026\t{i}\t{i % 6}\tdog {i}\tdog{' cat' * (i % 6)}" for i in range(12)]
    (sts / "sts-test.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "scores"
    run(evaluate_main, *model, "--data", photos, "--tasks", "retrieval", "--output", out)
    assert json.loads((out / "results.json").read_text())["results"]
    run(evaluate_main, *model, "--data", tmp_path, "--tasks", "stsb")
    assert "STS-B" in capsys.readouterr().out

    result = mteb.evaluate(
        MtebEncoder(model=e5v), make_task("it2i"), cache=None, show_progress_bar=False
    )
    assert "recall_at_1" in result.task_results[0].scores["test"][0]


@pytest.mark.slow
def test_analyse(at: Callable[[str], Place], tmp_path: Path) -> None:
    """Less and less of the prompt, grey images, plots."""
    found = at("qwen2.5-vl")
    model = ("--model", found.folder / "base", "--dtype", "float32")
    out = ("--data", found.folder / "photos", "--output", tmp_path / "space")
    run(evaluate_main, "analyse", *model, *out)
    assert json.loads((tmp_path / "space" / "analysis.json").read_text())["images"]


@pytest.mark.parametrize("topology", ["cpu", "gpu:h100:1"])
def test_dry_runs(topology: str, at: Callable[[str], Place], capsys: Any) -> None:
    """Of a folder, on a machine that is here and one that is not."""
    base = at("qwen2.5-vl").folder / "base"
    model = ("--model", base, "--topology", topology, "--batch-size", 2, "--json")
    words = [["encode", *model, "--image-size", 60, 90], ["train", *model, "--lora.rank", 2]]
    for line in words[: 1 if topology == "cpu" else 2]:  # compiling takes longer
        run(dryrun_main, *line)
        report = json.loads(capsys.readouterr().out)
        assert report["flops"] > 0


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen2.5-vl-7b", "qwen2-vl-2b"])
def test_flops_of_published_models_are_the_traced_ones(name: str) -> None:
    """Of texts, images of two shapes and the training step."""
    family, model = architectures()[name]
    if model.vision.fullatt_block_indexes:  # of a choice, the tracer counts the most
        vision = replace(model.vision, fullatt_block_indexes=tuple(range(model.vision.depth)))
        model = replace(model, vision=vision)
    target = Target(family, model, Runtime.on(make_mesh(1, 1, 1, devices=jax.devices()[:1])))
    half = Precision(jnp.bfloat16, jnp.bfloat16)
    for size in (None, (200, 300), (1000, 100)):
        length, key = (64, 0) if size is None else family.image_shape(model, size, 20)
        program = encode_program(target, BatchShape(2, length, key), half)
        by_hand = flops.count_forward(
            family, model, rows=2, length=length, shape_key=key, pooled_only=True
        )
        traced = flops.traced_flops(program.trace().jaxpr)
        assert traced == pytest.approx(by_hand.forward, rel=0.01 if key else 1e-4)
    cfg = TrainConfig(model=Path("x"), output=Path("y"), batch_size=8, remat="full")
    forward = flops.count_forward(family, model, rows=24, length=64, lora=cfg.lora)
    by_hand = flops.train_flops(forward, frozen_base=True, remat="full", chunked=False)
    traced = flops.traced_flops(train_program(cfg, target, (64,)).trace().jaxpr)
    assert traced == pytest.approx(by_hand, rel=1e-3)
