"""Programs compiled for TPUs that are not here: they fit, and their figures are the estimate's.

Needs libtpu (pip install -e '.[tpu]'), no TPU. Each compiles for a minute or two on two cores.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from e5v_jax.dryrun.run import TrainDryRun, report_train
from e5v_jax.dryrun.topology import compile_devices, parse_topology
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.text import TEXT
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Build, Linear, LoRAConfig, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import batch_sharding, make_mesh
from e5v_jax.train.config import TrainConfig

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.optimized,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install -e '.[tpu]'",
    ),
]
# The recipe's dropout adds no matmul and doubles the time to compile: both are seen.
DROPOUT = pytest.mark.parametrize("dropout", ["0.0", "0.05"])
TRAIN = ["train", "--model", "e5v-llama3-8b"]
ENCODE = ["encode", "--model", "e5-v"]


def dry_run(words: list[str], *flags: str) -> dict[str, Any]:
    """In a process of its own: libtpu writes to the process's stderr, and keeps gigabytes."""
    done = subprocess.run(
        [sys.executable, "-m", "e5v_jax.dryrun", *words, "--json", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["method"] == ("estimated" if "gpu" in report["topology"] else "compiled")
    return report


def assert_estimate_agrees(report: dict[str, Any], *flags: str) -> None:
    """The formulas used for GPUs, on as many chips, within 10 % of what XLA keeps alive."""
    estimate = dry_run(TRAIN, "--topology", f"gpu:h100:{report['chips']}", *flags)
    assert estimate["memory"]["peak"] == pytest.approx(report["memory"]["live"], rel=0.1)
    assert estimate["memory"]["parameters"] == report["memory"]["parameters"]
    assert estimate["flops"] == pytest.approx(report["flops"], rel=0.01)


# A compilation takes minutes: one encoder is in `make test`, the rest is slow.
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1"])
def test_nf4_is_dequantised_on_the_chip(topology: str) -> None:
    """A matmul and its gradient move the dense kernel, its codes and nothing of fp32 beside."""
    runtime = Runtime(make_mesh(1, 1, 1, devices=compile_devices(parse_topology(topology))), "tpu")
    build = Build(Precision(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), "nf4"), runtime)
    rows, shape = 256, (1088, 1536)
    module = nnx.eval_shape(lambda: Linear(*shape, build, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)

    def loss(x: jax.Array, state: nnx.State) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graphdef, state)(x).astype(jnp.float32)))

    whole = NamedSharding(runtime.mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    x, state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), (x, state)
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, state).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2  # forward and backward
    assert f"f32[{shape[0]},{shape[1]}]" not in text and f",64,{shape[1]}]" not in text


def test_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the host's memory goes, and comes back, what the formula says, to the byte."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = LLAVA_NEXT.architectures["llava-next-llama3-8b"].text
    model = TextModelConfig(dataclasses.replace(text, **sizes, **heads))
    monkeypatch.setitem(TEXT.architectures, "tiny", model)
    run = TrainConfig(
        model=Path("none"),
        output=Path("unused"),
        batch_size=128,
        remat="offload_dots_except_mlp",
        lora=LoRAConfig(rank=8, alpha=4.0),
    )
    found, formula = (
        report_train(TrainDryRun(run=run, topology=name, architecture="tiny")).cost
        for name in ("v5e:1x1", "gpu:h100:1")
    )
    assert (found.method, formula.method) == ("compiled", "estimated")
    assert found.host_memory == formula.host_memory > 0
    assert found.host_bytes == formula.host_bytes == 2 * found.host_memory
    assert found.parameters + found.optimizer < found.live <= found.peak


@pytest.mark.slow
@DROPOUT
@pytest.mark.parametrize(("topology", "chips"), [("v5p:2x2x4", 16), ("v5e:4x8", 32)])
def test_paper_recipe_on_a_slice(topology: str, chips: int, dropout: str) -> None:
    flags = ["--lora.dropout", dropout]
    report = dry_run(TRAIN, "--topology", topology, *flags)
    assert (report["chips"], report["items_per_step"]) == (chips, 768)
    assert report["fits"]
    # every input twice forward and once backward, over 2304 sentences of 64 tokens
    assert report["flops"] * chips == pytest.approx(5.836e15, rel=0.01)
    # the bf16 weights of the layers gathered in both forward passes and for the backward one;
    # were activations split along their features instead, all-reduces would be ten times that
    weights = 2 * 6.98e9 * (chips - 1) / chips
    collectives = report["collective_bytes"]
    assert collectives["all-gather"] == pytest.approx(2 * weights, rel=0.15)
    assert collectives.get("collective-permute", 0) < 1e9
    assert sum(collectives.values()) < 1.2 * collectives["all-gather"]
    assert report["bound"] == "compute"
    assert_estimate_agrees(report, *flags)


@pytest.mark.slow
@DROPOUT
def test_paper_recipe_with_nf4_base_on_one_v5e_chip(dropout: str) -> None:
    """All 768 triplets of a step, on 16 GB."""
    flags = ["--quantize", "nf4", "--chunk-size", "64", "--lora.dropout", dropout]
    report = dry_run(TRAIN, "--topology", "v5e:1x1", *flags)
    assert report["items_per_step"] == 768 and report["fits"]
    assert report["memory"]["peak"] < 16e9
    # 4 bits and a 32-bit scale for 64 of them: 6.98e9 * 4.5 / 8; embeddings bf16; factors fp32
    expected = 6.98e9 * 4.5 / 8 + 2 * 128320 * 4096 + 4 * 168e6
    assert report["memory"]["parameters"] == pytest.approx(expected, rel=0.01)
    assert report["bound"] == "compute"  # not if each weight were looked up in memory
    assert_estimate_agrees(report, *flags)


@pytest.mark.parametrize("topology", ["v5p:1x1x1", pytest.param("v5e:1x1", marks=pytest.mark.slow)])
def test_encoding_square_images(topology: str) -> None:
    """Sequences of 3,072 positions, five at a time: bf16 on v5p, int8 on 16 GB."""
    quantize = ["--quantize", "int8"] if "v5e" in topology else []
    report = dry_run(ENCODE, "--topology", topology, *quantize)
    assert report["item"] == "images" and report["fits"]
    assert report["memory"]["parameters"] < report["memory"]["peak"] < 29e9
    assert report["flops"] / 5 == pytest.approx(45.9e12, rel=0.05)  # padding included
    # attention is splash: the logits of a plain one would be 32 heads x 3072 x 3072 fp32 an image
    assert report["memory"]["activations"] < 5 * 32 * 3072 * 3072 * 4
    assert report["bound"] == "compute"


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("length", [64, 256])
def test_attention_and_its_gradient(topology: str, length: int) -> None:
    """XLA's for short texts, splash for longer ones, each device its own rows."""
    mesh = make_mesh(devices=compile_devices(parse_topology(topology)))
    q, k = (
        jax.ShapeDtypeStruct((8, length, n, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
        for n in (8, 2)
    )
    precision = Precision(jnp.bfloat16, jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        runtime = Runtime.on(mesh)
        return attention(q, k, k, is_causal=True, precision=precision, runtime=runtime).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(q, k)
    text = traced.lower().compile().as_text()
    assert ("splash" in text) == (length == 256)
    assert not any(f" {name}(" in text for name in ("all-gather", "all-to-all", "all-reduce"))


@pytest.mark.slow
def test_paper_recipe_on_a_v5e_pod() -> None:
    report = dry_run(TRAIN, "--topology", "v5e:16x16")
    assert report["chips"] == 256 and report["fits"]


def test_a_step_that_does_not_fit_is_a_report() -> None:
    """libtpu refuses it; that is an answer, with a remedy, and no error."""
    report = dry_run(TRAIN, "--topology", "v5e:1x1", "--quantize", "nf4")
    assert not report["fits"] and report["remedy"].startswith("--chunk-size")
    assert report["memory"]["peak"] > report["capacity"]
