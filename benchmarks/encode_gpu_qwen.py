"""Encoding with a full Qwen3-VL on a GPU: E5V's encoder and transformers, MFU of both.

    python benchmarks/encode_gpu_qwen.py --peak-tflops 989      # H100 SXM, bf16
    python benchmarks/encode_gpu_qwen.py --tiny                 # any machine: does it run?

Random bf16 weights, made on the device; nothing is downloaded. Texts of 64 tokens, and photographs
of 500x375 pixels: 768 patches, 192 tokens and a prompt of 28. Each side runs in a process of its
own, one after the other. From arrays on the host to vectors on the host, for both.
"""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import tyro

from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.config import QwenVLConfig

Kind = Literal["texts", "images"]
TEXT_TOKENS = 64
PROMPT_TOKENS = 28
GRID = (24, 32)  # patches (rows, columns) of 500x375 pixels


@dataclass(frozen=True)
class Args:
    """Random weights of a Qwen3-VL; items a second and model FLOP utilisation."""

    architecture: str = "qwen3-vl-2b"
    """Also qwen3-vl-4b and qwen3-vl-8b."""
    peak_tflops: float | None = None
    """The device's dense bf16 peak, for the utilisation; without it only TFLOP/s are shown."""
    text_batch: int = 256
    """Texts of a batch."""
    image_batch: int = 64
    """Images of a batch."""
    repetitions: int = 5
    """Timed batches, after two that are not timed."""
    tiny: bool = False
    """A small model."""
    side: Literal["e5v-jax", "transformers"] | None = None
    """Be one side (the command starts itself so)."""


def find_architecture(args: Args) -> QwenVLConfig:
    """The architecture, or small with the same parts."""
    cfg = QWEN_VL.architectures[args.architecture]
    assert isinstance(cfg, QwenVLConfig)
    if not args.tiny:
        return cfg
    text: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "depth": 4}
    vision |= {"num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": (0, 1, 2)}
    return dataclasses.replace(
        cfg,
        text=dataclasses.replace(cfg.text, **text),
        vision=dataclasses.replace(cfg.vision, **vision),
    )


def image_tokens(cfg: QwenVLConfig) -> int:
    """Of one photograph."""
    return GRID[0] * GRID[1] // cfg.vision.merged


def model_flops(cfg: QwenVLConfig, kind: Kind) -> float:
    """Of one item, nothing padded: matmuls for every token, causal attention counted half."""
    from e5v_jax.dryrun.flops import count_forward

    tokens = TEXT_TOKENS if kind == "texts" else PROMPT_TOKENS + image_tokens(cfg)
    patches = 0 if kind == "texts" else GRID[0] * GRID[1]
    return count_forward(
        QWEN_VL, cfg, rows=1, length=tokens, shape_key=patches, causal_half=True
    ).forward


def ours(args: Args, cfg: QwenVLConfig) -> dict[Kind, float]:
    """Seconds of a batch; two are on the device at a time, as in E5V.encode."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from e5v_jax.encode.encoder import delayed, make_encode_step
    from e5v_jax.families.base import BatchShape
    from e5v_jax.families.qwen_vl.model import ImageBatch
    from e5v_jax.families.qwen_vl.patches import patch_places
    from e5v_jax.families.qwen_vl.positions import position_ids
    from e5v_jax.families.qwen_vl.processor import PATCH_BUCKETS
    from e5v_jax.nn.layers import Build, Precision
    from e5v_jax.runtime import Runtime
    from e5v_jax.sharding import make_mesh, place_split

    runtime = Runtime.on(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    precision = Precision(jnp.bfloat16, jnp.bfloat16)
    graphdef, state = nnx.split(
        jax.jit(lambda: QWEN_VL.build(cfg, Build(precision, runtime), rngs=nnx.Rngs(0)))()
    )
    step = make_encode_step(graphdef, runtime)
    rng = np.random.default_rng(0)
    patches, tokens = GRID[0] * GRID[1], image_tokens(cfg)
    bucket = next(size for size in PATCH_BUCKETS if size >= patches)
    length = -(-(bucket // cfg.vision.merged + 48) // 128) * 128  # as the processor pads
    merge = cfg.vision.spatial_merge_size

    def filled(count: int, length: int, used: int, key: int) -> Any:
        like = QWEN_VL.example_batch(cfg, BatchShape(count, length, key))
        batch = jax.tree.map(lambda x: np.array(x), like)
        ids = rng.integers(0, 500, (count, length), dtype=np.int32)
        batch = batch._replace(input_ids=ids, last_index=np.full(count, used - 1, np.int32))
        if not isinstance(batch, ImageBatch):
            return batch
        batch.image_index[:, 5 : 5 + tokens] = np.arange(tokens)
        assert batch.positions is not None
        grid = (GRID[0] // merge, GRID[1] // merge)
        batch.positions[:, :used] = position_ids(used, 5, grid)
        shape = batch.patches.pixels[:, :patches].shape
        batch.patches.pixels[:, :patches] = rng.integers(0, 256, shape, np.uint8)
        batch.patches.place[:] = -1
        batch.patches.place[:, :patches] = patch_places(GRID, merge)
        batch.patches.grid[:] = GRID
        return batch

    seconds: dict[Kind, float] = {}
    plans: tuple[tuple[Kind, Any], ...] = (
        ("texts", filled(args.text_batch, TEXT_TOKENS, TEXT_TOKENS, 0)),
        ("images", filled(args.image_batch, length, PROMPT_TOKENS + tokens, bucket)),
    )
    for kind, batch in plans:

        def run(times: int, batch: Any = batch) -> None:
            started = (step(state, place_split(batch, runtime.mesh)) for _ in range(times))
            for out in delayed(started, 2):
                assert np.isfinite(np.asarray(out)).all()

        run(2)  # compiles
        start = time.perf_counter()
        run(args.repetitions)
        seconds[kind] = (time.perf_counter() - start) / args.repetitions
    return seconds


def theirs(args: Args, cfg: QwenVLConfig) -> dict[Kind, float]:
    """The same of transformers with sdpa."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = dataclasses.asdict(cfg.text)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"]
    names += ["num_attention_heads", "num_key_value_heads", "rms_norm_eps"]
    names += ["max_position_embeddings"]
    rope = {"rope_type": "default", "rope_theta": cfg.text.rope_theta}
    rope |= {"mrope_section": list(cfg.text.mrope_section), "mrope_interleaved": True}
    vision = dataclasses.asdict(cfg.vision)
    config = Qwen3VLConfig(
        text_config={**{name: text[name] for name in names}, "rope_parameters": rope},
        vision_config={
            **{name: vision[name] for name in vision if name not in ("rope_theta",)},
            "deepstack_visual_indexes": list(cfg.vision.deepstack_visual_indexes),
        },
        image_token_id=cfg.image_token_id,
        vision_start_token_id=cfg.vision_start_token_id,
        vision_end_token_id=cfg.vision_end_token_id,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # one of every configuration
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = Qwen3VLModel(config).eval()
    tokens, patches = image_tokens(cfg), GRID[0] * GRID[1]
    ids = torch.randint(0, 500, (args.image_batch, PROMPT_TOKENS + tokens))
    ids[:, 4] = cfg.vision_start_token_id
    ids[:, 5 : 5 + tokens] = cfg.image_token_id
    pixels = 3 * 2 * cfg.vision.patch_size**2
    inputs: dict[Kind, dict[str, Any]] = {
        "texts": {"input_ids": torch.randint(0, 500, (args.text_batch, TEXT_TOKENS))},
        "images": {
            "input_ids": ids,
            "mm_token_type_ids": (ids == cfg.image_token_id).long(),
            "pixel_values": torch.randn(args.image_batch * patches, pixels),
            "image_grid_thw": torch.tensor([[1, *GRID]] * args.image_batch),
        },
    }
    seconds: dict[Kind, float] = {}
    with torch.inference_mode():
        for kind, batch in inputs.items():

            def run(batch: dict[str, Any] = batch) -> None:
                placed = {name: array.to(device) for name, array in batch.items()}
                hidden = model(**placed, use_cache=False).last_hidden_state[:, -1]
                hidden.float().cpu()

            for _ in range(2):
                run()
            start = time.perf_counter()
            for _ in range(args.repetitions):
                run()
            seconds[kind] = (time.perf_counter() - start) / args.repetitions
    return seconds


def main(args: Args) -> None:
    """Be one side, or run both and print the table."""
    cfg = find_architecture(args)
    if args.side is not None:
        print(json.dumps((ours if args.side == "e5v-jax" else theirs)(args, cfg)))
        return
    counts: dict[Kind, int] = {"texts": args.text_batch, "images": args.image_batch}
    print(", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers")))
    print(f"\n| {args.architecture} | batch | items/s | TFLOP/s | model FLOP utilisation |")
    print("|---|---|---|---|---|")
    for side in ("e5v-jax", "transformers"):
        command = [sys.executable, *sys.argv, "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds: dict[Kind, float] = json.loads(done.stdout.splitlines()[-1])
        for kind, count in counts.items():
            rate = count / seconds[kind]
            tflops = rate * model_flops(cfg, kind) / 1e12
            used = "" if args.peak_tflops is None else f"{100 * tflops / args.peak_tflops:.0f} %"
            print(f"| {side}, {kind} | {count} | {rate:.2f} | {tflops:.3f} | {used} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
