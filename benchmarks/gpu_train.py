"""A training step of random weights on the GPU here: tokens/s, utilisation, memory, the estimate.

    python benchmarks/gpu_train.py --topology gpu:h100:1                        # LoRA, bf16 base
    python benchmarks/gpu_train.py --topology gpu:h100:1 --quantize nf4         # QLoRA
    python benchmarks/gpu_train.py --chunk-size None --remat offload_dots_except_mlp

The step is the one of the dry run, which is the one that trains; weights are random, so no model is
needed. Prints one JSON object.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from e5v_jax import cli
from e5v_jax.dryrun.program import Target, train_program
from e5v_jax.dryrun.run import TrainDryRun, report_train
from e5v_jax.families import architectures
from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.families.llava_next.presets import ARCHITECTURES
from e5v_jax.nn.remat import Remat
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.config import TrainConfig


@dataclass(frozen=True)
class Args:
    """Time training steps of an architecture with random weights, beside the dry run's estimate."""

    topology: str = "gpu:h100:1"
    """What this machine is, for the estimate and the peak FLOP/s."""
    architecture: str = "llava-next-llama3-8b"
    """Name among e5v_jax.families.architectures()."""
    tiny: bool = False
    """The same architecture with 2 layers of width 128: does the benchmark run at all?"""
    quantize: Literal["nf4", "int8", "int8_weight_only"] | None = None
    """Storage of the base."""
    batch_size: int = 768
    """Triplets of a step."""
    chunk_size: int | None = 96
    """Sentences in the model at a time."""
    length: int = 64
    """Positions of a sentence, all of them used."""
    remat: Remat = "full"
    """What the backward pass keeps of each layer; offload_dots and its kin with no chunk_size."""
    steps: int = 5
    """Timed steps, after two that are not."""


def shrink(model: LlavaNextConfig) -> LlavaNextConfig:
    """The same with 2 layers of width 128."""
    small: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
    }
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return dataclasses.replace(model, text=dataclasses.replace(model.text, **small, **heads))


def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values where the shape says: small floats, or any codes of 4 or 8 bits."""

    def make() -> jax.Array:
        key = jax.random.key(0)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)
        return jax.random.bits(key, shape.shape, jnp.uint8).astype(shape.dtype)

    return jax.jit(make, out_shardings=shape.sharding)()


def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros where the shape says, or the first random key."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), shape.sharding)
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)


def measure(args: Args) -> dict[str, Any]:
    """Run the step and read clock and allocator; ``estimate`` is the dry run's of the same."""
    name = args.architecture
    family, model = architectures()[name]
    if args.tiny:
        assert isinstance(model, LlavaNextConfig)
        name, model = "tiny", shrink(model)
        ARCHITECTURES[name] = model
    cfg = TrainConfig(
        model=Path(),
        output=Path(),
        quantize=args.quantize,
        batch_size=args.batch_size,
        chunk_size=args.chunk_size,
        remat=args.remat,
    )
    estimate = report_train(
        TrainDryRun(
            run=cfg, topology=args.topology, architecture=name, sequence_lengths=(args.length,)
        )
    )
    program = train_program(cfg, Target(family, model, Runtime.on(make_mesh())), (args.length,))
    trainable, opt_state, frozen, batch, key = program.args
    trainable, frozen = jax.tree.map(fill, (trainable, frozen))
    opt_state, batch, key = jax.tree.map(zeros, (opt_state, batch, key))
    rng = np.random.default_rng(0)
    rows = 3 * args.batch_size
    ids = rng.integers(0, model.text.vocab_size, (rows, args.length), np.int32)
    (group,) = batch.groups
    group = group._replace(
        input_ids=jax.device_put(ids, group.input_ids.sharding),
        last_index=jax.device_put(
            np.full(rows, args.length - 1, np.int32), group.last_index.sharding
        ),
    )
    order = np.arange(rows, dtype=np.int32)
    batch = batch._replace(groups=(group,), order=jax.device_put(order, batch.order.sharding))
    seconds = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        trainable, opt_state, metrics = program.function(trainable, opt_state, frozen, batch, key)
        loss = float(metrics.loss)  # waits for the step
        seconds.append(time.perf_counter() - start)
    step = float(np.median(seconds[2:]))
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    chip = estimate.topology.chip
    peak_flops = chip.flops if chip else float("nan")
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "program": estimate.program,
        "first_step_seconds": seconds[0],
        "step_seconds": step,
        "tokens_per_second": estimate.tokens / step,
        "triplets_per_second": args.batch_size / step,
        "model_flop_utilization": estimate.useful_flops / step / peak_flops,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "estimated_peak_bytes": estimate.cost.peak,
        "estimated_host_bytes": estimate.cost.host_memory,
        "roofline_seconds": estimate.step_seconds,
        "loss": loss,
    }


def main(args: Args) -> None:
    """Print the measurement as JSON."""
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    cli.run(main, Args)
