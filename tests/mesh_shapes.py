"""Loss, gradients and placement of one step on (data, fsdp, tensor) meshes of 8 devices.

A program, not a test: it needs 8 virtual devices from the start (test_mesh.py runs it). It prints
one JSON line per mesh.
"""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from test_train_step import LORA, TEMPERATURE, flat, largest_relative, make_pair_batch, make_tokens

from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import dotted, load_model
from e5v_jax.families.base import Together
from e5v_jax.nn.layers import Build, LoRAConfig, LoRAParam, Precision
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.batches import group_lengths
from e5v_jax.train.config import LossConfig
from e5v_jax.train.feed import place
from e5v_jax.train.optimizer import init_optimizer
from e5v_jax.train.step import make_train_step, pair_loss, split_trainable

SHAPES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
SOME_SHAPES = [(8, 1, 1), (1, 4, 2), (2, 2, 2)]


def load(folder: Path, mesh: Mesh, quantization: str | None, lora: LoRAConfig) -> nnx.Module:
    precision = Precision(np.float32, np.float32, quantization)
    source = open_source(folder)
    model = load_model(source, Build(precision, Runtime.on(mesh), lora), seed=5)
    graphdef, factors, rest = nnx.split(model, LoRAParam, ...)
    rng = np.random.default_rng(1)  # b that is not zero, so that it shows
    values = jax.tree.map(
        lambda x: jax.device_put((0.2 * rng.normal(size=x.shape)).astype(np.float32), x.sharding),
        factors,
    )
    return nnx.merge(graphdef, values, rest)


def step_on(folder: Path, mesh: Mesh, **options: Any) -> dict[str, Any]:
    """Loss, gradients (host) and misplaced arrays of a step on ``mesh``."""
    tokens = make_tokens(3, rows=8)
    rows = [np.arange(8)]
    lengths = group_lengths(tokens.lengths, rows, groups=1, multiple=8)
    host = make_pair_batch(tokens, rows[0], lengths=lengths, multiple=8)
    batch = place(host, mesh)
    lora = replace(LORA, dropout=options.get("dropout", 0.0))
    model = load(folder, mesh, options.get("quantization"), lora)
    graphdef, trainable, frozen = split_trainable(model, lora=True)
    optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(1e-3))  # its state is the gradient
    state = init_optimizer(optimizer, trainable, mesh)
    step = make_train_step(
        graphdef,
        optimizer,
        partial(
            pair_loss,
            columns=3,
            loss=LossConfig(temperature=TEMPERATURE),
            chunk_size=options.get("chunk_size"),
            remat=options.get("remat", "none"),
            together=Together(2, 0) if "texts_per_row" in options else None,
        ),
        dropout="dropout" in options,
        state=(trainable, state),
    )
    after, state, metrics = step(trainable, state, frozen, batch, jax.random.key(0))
    gradients = flat(state[0].trace)
    table = open_source(folder).table
    misplaced = [*misplaced_in(after, mesh, table), *misplaced_in(frozen, mesh, table)]
    step(after, state, frozen, batch, jax.random.key(0))
    if step._cache_size() != 1:
        misplaced.append("the step compiled again for the state that it returned")
    found = {"loss": float(metrics.loss), "gradients": gradients, "misplaced": misplaced}
    if "quantization" in options:
        arguments = (trainable, state, frozen, batch, jax.random.key(0))
        found["gathered"] = gathered_kernels(step.lower(*arguments).compile().as_text())
    return found


def gathered_kernels(hlo: str) -> list[str]:
    """The types of the kernels, split in two by ``tensor``, that are gathered over ``fsdp``."""
    return sorted(set(re.findall(r"(\w+)\[(?:1,)?(?:128,64|64,128|128,32)\]\S* all-gather\(", hlo)))


def misplaced_in(state: nnx.State, mesh: Mesh, table: ParameterTable) -> list[str]:
    """Arrays that are not split as the rows say; an axis of size 1 is whole everywhere."""
    found = []
    for path, leaf in nnx.to_flat_state(state):
        for array in jax.tree.leaves(leaf):
            spec = table.spec(dotted(path), array.ndim)
            expected = tuple(
                n if axis is None or n == 1 else n // mesh.shape[axis]
                for n, axis in zip(array.shape, spec, strict=True)
            )
            local = array.sharding.shard_shape(array.shape)
            if local != expected:
                found.append(f"{dotted(path)} {array.shape}: {local}, expected {expected}")
    return found


def main(folder: Path, meshes: str) -> None:
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    plain = {"shapes": SHAPES if meshes == "all" else SOME_SHAPES, "options": {}}
    everything = {"quantization": "nf4", "chunk_size": 8, "remat": "full", "dropout": 0.1}
    everything |= {"texts_per_row": 2}
    offloaded = {"shapes": [(2, 2, 2)], "options": {"remat": "offload_dots_except_mlp"}}
    for case in (plain, offloaded, {"shapes": [(2, 2, 2)], "options": everything}):
        expected = step_on(folder, one, **case["options"])
        for shape in case["shapes"]:
            found = step_on(folder, make_mesh(*shape), **case["options"])
            result = {
                "mesh": shape,
                "options": case["options"],
                "loss": found["loss"] / expected["loss"] - 1,
                "gradients": largest_relative(found["gradients"], expected["gradients"]),
                "misplaced": found["misplaced"],
                "gathered": found.get("gathered"),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
