"""Encoding with the full 8 B architecture on a GPU: E5V's encoder and transformers, MFU of both.

    python benchmarks/encode_gpu.py --peak-tflops 989      # H100 SXM, bf16
    python benchmarks/encode_gpu.py --tiny                 # any machine: does it run?

Random bf16 weights, made on the device; nothing is downloaded. Texts of 40 tokens, and images of
640x480 pixels (2340 tokens and a prompt of 20, 5 tiles). Each side runs in a process of its own,
one after the other, as both want the whole memory. PyTorch needs its CUDA build.
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

from e5v_jax.families.llava_next.presets import ARCHITECTURES
from e5v_jax.nn.config import ModelConfig

Kind = Literal["texts", "images"]
TEXT_TOKENS = 40
PROMPT_TOKENS = 20
IMAGE_SIZE = (480, 640)  # (height, width)


@dataclass(frozen=True)
class Args:
    """Random weights of llava-next-llama3-8b; items a second and model FLOP utilisation."""

    peak_tflops: float | None = None
    """The device's dense bf16 peak, for the utilisation; without it only TFLOP/s are shown."""
    text_batch: int = 256
    """Texts of a batch."""
    image_batch: int = 6
    """Images of a batch."""
    repetitions: int = 5
    """Timed batches, after two that are not timed."""
    compile: bool = False
    """torch.compile for PyTorch's model."""
    tiny: bool = False
    """A small model."""
    side: Literal["e5v-jax", "transformers"] | None = None
    """Be one side (the command starts itself so)."""


def architecture(args: Args) -> ModelConfig:
    """llava-next-llama3-8b, or small with the same parts."""
    cfg = ARCHITECTURES["llava-next-llama3-8b"]
    if not args.tiny:
        return cfg
    assert cfg.vision is not None
    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2}
    return dataclasses.replace(
        cfg,
        text=dataclasses.replace(cfg.text, **text),
        vision=dataclasses.replace(cfg.vision, **vision),
        image_token_id=511,
    )


def model_flops(cfg: ModelConfig, kind: Kind) -> float:
    """Of one item: matmuls of every layer for every token, causal attention counted half.

    Both sides are given the same count, though ours leaves most of the last layer out.
    """
    t, v = cfg.text, cfg.vision
    assert v is not None
    tokens = TEXT_TOKENS if kind == "texts" else PROMPT_TOKENS + len(image_rows(cfg))
    heads = t.num_attention_heads * t.head_dim
    layer = t.hidden_size * (2 * heads + 2 * t.num_key_value_heads * t.head_dim)
    layer += 3 * t.hidden_size * t.intermediate_size
    flops = t.num_hidden_layers * (2.0 * tokens * layer + 2.0 * tokens**2 * heads)
    if kind == "images":
        patches, d = v.num_patches, v.hidden_size
        block = 2.0 * (patches + 1) * (4 * d * d + 2 * d * v.intermediate_size)
        block += 4.0 * (patches + 1) ** 2 * d
        projector = 2.0 * patches * (d * t.hidden_size + t.hidden_size**2)
        flops += 5 * (cfg.num_vision_layers * block + projector)
    return flops


def image_rows(cfg: ModelConfig) -> np.ndarray:
    """Which feature each token of the image is."""
    from e5v_jax.data.images import image_token_index

    assert cfg.vision is not None
    return image_token_index(
        IMAGE_SIZE,
        grid_pinpoints=cfg.image_grid_pinpoints,
        image_size=cfg.vision.image_size,
        patch_size=cfg.vision.patch_size,
    )


def ours(args: Args, cfg: ModelConfig) -> dict[Kind, float]:
    """Seconds of a batch, from host arrays to vectors on the host."""
    import jax
    import jax.numpy as jnp

    from e5v_jax.checkpoints.loading import build
    from e5v_jax.data.images import NEWLINE
    from e5v_jax.data.inputs import Measured, Prepared
    from e5v_jax.encode.batching import IMAGE_BUCKETS, Batch
    from e5v_jax.encode.encoder import Encoder
    from e5v_jax.nn.layers import Precision
    from e5v_jax.sharding import make_mesh

    assert cfg.vision is not None
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    precision = Precision(jnp.bfloat16, jnp.bfloat16)
    model = jax.jit(lambda: build(cfg, precision=precision))()
    encoder = Encoder(model, mesh, pad_id=0)
    rng = np.random.default_rng(0)
    side, patches = cfg.vision.image_size, cfg.vision.num_patches
    rows = image_rows(cfg)
    index = np.full(PROMPT_TOKENS + len(rows), -1, np.int32)
    index[5 : 5 + len(rows)] = np.where(rows == NEWLINE, 5 * patches, rows)

    def text() -> Prepared:
        return Prepared(rng.integers(0, 500, TEXT_TOKENS).tolist())

    def image() -> Prepared:
        tiles = rng.integers(0, 256, (5, side, side, 3), dtype=np.uint8)
        return Prepared(rng.integers(0, 500, len(index)).tolist(), index, tiles, patches)

    image_length = min(n for n in IMAGE_BUCKETS if n >= len(index))
    seconds: dict[Kind, float] = {}
    plans: tuple[tuple[Kind, Any, int, int, int], ...] = (
        ("texts", text, args.text_batch, TEXT_TOKENS, 0),
        ("images", image, args.image_batch, image_length, 5),
    )
    for kind, make, count, length, tiles in plans:
        items = [make() for _ in range(count)]
        measured = [Measured(i, [], len(item.ids)) for i, item in enumerate(items)]
        batch = Batch(measured, count, length, tiles)
        list(encoder.run([(batch, items)] * 2))  # compiles
        start = time.perf_counter()
        list(encoder.run([(batch, items)] * args.repetitions))
        seconds[kind] = (time.perf_counter() - start) / args.repetitions
    return seconds


def theirs(args: Args, cfg: ModelConfig) -> dict[Kind, float]:
    """The same of transformers with sdpa; its inputs are on the device already."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    assert cfg.vision is not None and cfg.image_token_id is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = dataclasses.asdict(cfg.text)
    text = {k: v for k, v in text.items() if k not in ("rope_theta", "model_type")}
    rope = {"rope_type": "default", "rope_theta": cfg.text.rope_theta}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**dataclasses.asdict(cfg.vision)),
        text_config=LlamaConfig(**text, rope_parameters=rope),
        image_token_index=cfg.image_token_id,
        image_grid_pinpoints=[list(size) for size in cfg.image_grid_pinpoints],
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = LlavaNextModel(config).eval()
    if args.compile:
        model = torch.compile(model)
    tokens = len(image_rows(cfg))
    side = cfg.vision.image_size
    ids = torch.randint(0, 500, (args.image_batch, PROMPT_TOKENS + tokens), device=device)
    ids[:, 5 : 5 + tokens] = cfg.image_token_id
    inputs: dict[Kind, dict[str, Any]] = {
        "texts": {
            "input_ids": torch.randint(0, 500, (args.text_batch, TEXT_TOKENS), device=device)
        },
        "images": {
            "input_ids": ids,
            "pixel_values": torch.randn(args.image_batch, 5, 3, side, side, device=device),
            "image_sizes": torch.tensor([IMAGE_SIZE] * args.image_batch, device=device),
        },
    }
    seconds: dict[Kind, float] = {}
    with torch.inference_mode():
        for kind, batch in inputs.items():

            def run(batch: dict[str, Any] = batch) -> None:
                hidden = model(**batch, use_cache=False).last_hidden_state[:, -1]
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
    cfg = architecture(args)
    if args.side is not None:
        print(json.dumps((ours if args.side == "e5v-jax" else theirs)(args, cfg)))
        return
    counts: dict[Kind, int] = {"texts": args.text_batch, "images": args.image_batch}
    print(", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers")))
    print("\n| | batch | items/s | TFLOP/s | model FLOP utilisation |")
    print("|---|---|---|---|---|")
    for side in ("e5v-jax", "transformers"):
        command = [sys.executable, *sys.argv, "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds: dict[Kind, float] = json.loads(done.stdout.splitlines()[-1])
        for kind, count in counts.items():
            rate = count / seconds[kind]
            tflops = rate * model_flops(cfg, kind) / 1e12
            used = "" if args.peak_tflops is None else f"{100 * tflops / args.peak_tflops:.0f} %"
            print(f"| {side}, {kind} | {count} | {rate:.2f} | {tflops:.3f} | {used} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
