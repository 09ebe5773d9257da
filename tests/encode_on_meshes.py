"""Vectors of models on several meshes of 4 devices, as JSON lines of differences.

A program, not a test: it needs 4 virtual devices from the start (test_encode_mesh.py runs it).
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import picture
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from e5v_jax import E5V
from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import BATCH_SPEC, make_mesh

ITEMS: list[Any] = ["A dog sits.", "Snow.", "Two men play football in the rain."]
ITEMS += [picture(40, 60), picture(28, 28), {"text": "smaller", "image": picture(20, 90)}]


def splash_difference() -> float:
    """Splash attention with rows and heads split, against XLA's on one device."""
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (2, 128, n, 128)) for key, n in zip(keys, (4, 2, 2), strict=True)
    ]
    precision = Precision(jnp.float32, jnp.float32)

    def run(*qkv: jax.Array, runtime: Runtime) -> jax.Array:
        return attention(*qkv, is_causal=True, precision=precision, runtime=runtime)

    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    expected = jax.jit(partial(run, runtime=Runtime.on(one)))(*arrays)
    placed = jax.device_put(arrays, NamedSharding(mesh, P(*BATCH_SPEC, None, "tensor", None)))
    found = jax.jit(partial(run, runtime=Runtime(mesh, "tpu", "splash")))(*placed)
    assert len(found.sharding.device_set) == 4
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def main(folders: list[Path]) -> None:
    """Print the largest difference from one device, for every model and mesh."""
    for folder in folders:
        compare(folder)
    print(json.dumps({"mesh": "splash", "difference": splash_difference()}))


def compare(folder: Path) -> None:
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    expected = E5V.from_pretrained(folder, dtype="float32", mesh=one).encode(ITEMS)
    every = ((4, 1, 1), (1, 2, 2))
    for shape in every[1:] if folder.name == "windows" else every:
        mesh = make_mesh(*shape)
        found = E5V.from_pretrained(folder, dtype="float32", mesh=mesh).encode(ITEMS)
        difference = float(np.abs(found - expected).max())
        print(json.dumps({"model": folder.name, "mesh": shape, "difference": difference}))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
