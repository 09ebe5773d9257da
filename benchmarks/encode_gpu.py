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

from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.config import LlavaNextConfig

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


def architecture(args: Args) -> LlavaNextConfig:
    """llava-next-llama3-8b, or small with the same parts."""
    cfg = LLAVA_NEXT.architectures["llava-next-llama3-8b"]
    assert isinstance(cfg, LlavaNextConfig)
    if not args.tiny:
        return cfg
    text: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    vision: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2}
    return dataclasses.replace(
        cfg,
        text=dataclasses.replace(cfg.text, **text),
        vision=dataclasses.replace(cfg.vision, **vision),
        image_token_id=511,
    )


def model_flops(cfg: LlavaNextConfig, kind: Kind) -> float:
    """Of one item: matmuls of every layer for every token, causal attention counted half.

    Both sides are given the same count, though ours leaves most of the last layer out.
    """
    from e5v_jax.dryrun.flops import count_forward

    tokens = TEXT_TOKENS if kind == "texts" else PROMPT_TOKENS + len(image_rows(cfg))
    tiles = 0 if kind == "texts" else 5
    return count_forward(
        LLAVA_NEXT, cfg, rows=1, length=tokens, shape_key=tiles, causal_half=True
    ).forward


def image_rows(cfg: LlavaNextConfig) -> np.ndarray:
    """Which feature each token of the image is."""
    from e5v_jax.families.llava_next.tiling import image_token_index

    return image_token_index(
        IMAGE_SIZE,
        grid_pinpoints=cfg.image_grid_pinpoints,
        image_size=cfg.vision.image_size,
        patch_size=cfg.vision.patch_size,
    )


def ours(args: Args, cfg: LlavaNextConfig) -> dict[Kind, float]:
    """Seconds of a batch, from host arrays to vectors on the host."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from e5v_jax.encode.batching import Batch
    from e5v_jax.encode.encoder import Encoder
    from e5v_jax.families.base import BatchShape, Measured
    from e5v_jax.families.llava_next.config import ORIGINAL_IMAGE_TOKEN
    from e5v_jax.families.llava_next.processor import LlavaNextProcessor, Prepared
    from e5v_jax.families.llava_next.tiling import NEWLINE
    from e5v_jax.nn.layers import Build, Precision
    from e5v_jax.runtime import Runtime
    from e5v_jax.sharding import make_mesh

    runtime = Runtime.on(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    precision = Precision(jnp.bfloat16, jnp.bfloat16)
    graphdef, state = nnx.split(
        jax.jit(lambda: LLAVA_NEXT.build(cfg, Build(precision, runtime), rngs=nnx.Rngs(0)))()
    )
    # nothing is tokenised: the inputs are random ids
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x")))
    processor = LlavaNextProcessor(
        dataclasses.replace(cfg, image_token_id=ORIGINAL_IMAGE_TOKEN), words, template="llama3"
    )
    encoder = Encoder(graphdef, processor, runtime)
    rng = np.random.default_rng(0)
    side, patches = cfg.vision.image_size, cfg.vision.num_patches
    rows = image_rows(cfg)
    index = np.full(PROMPT_TOKENS + len(rows), -1, np.int32)
    index[5 : 5 + len(rows)] = np.where(rows == NEWLINE, 5 * patches, rows)

    def text() -> list[int]:
        ids: list[int] = rng.integers(0, 500, TEXT_TOKENS).tolist()
        return ids

    def image() -> Prepared:
        tiles = rng.integers(0, 256, (5, side, side, 3), dtype=np.uint8)
        return Prepared(rng.integers(0, 500, len(index)).tolist(), index, tiles)

    image_length = processor.padded_length(len(index), 5)
    seconds: dict[Kind, float] = {}
    plans: tuple[tuple[Kind, Any, int, int, int], ...] = (
        ("texts", text, args.text_batch, TEXT_TOKENS, 0),
        ("images", image, args.image_batch, image_length, 5),
    )
    for kind, make, count, length, tiles in plans:
        items = [make() for _ in range(count)]
        measured = [Measured(i, [], length) for i in range(count)]
        batch = Batch(measured, BatchShape(count, length, tiles))
        list(encoder.run(state, [(batch, items)] * 2))  # compiles
        start = time.perf_counter()
        list(encoder.run(state, [(batch, items)] * args.repetitions))
        seconds[kind] = (time.perf_counter() - start) / args.repetitions
    return seconds


def theirs(args: Args, cfg: LlavaNextConfig) -> dict[Kind, float]:
    """The same of transformers with sdpa; its inputs are on the device already."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    assert cfg.image_token_id is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = dataclasses.asdict(cfg.text)
    text = {k: v for k, v in text.items() if k not in ("rope_theta", "model_type")}
    rope = {"rope_type": "default", "rope_theta": cfg.text.rope_theta}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**cfg.vision.to_clip()),
        text_config=LlamaConfig(**text, rope_parameters=rope),
        image_token_index=cfg.image_token_id,
        image_grid_pinpoints=[list(size) for size in cfg.image_grid_pinpoints],
        attn_implementation="sdpa",  # type: ignore[call-arg]  # one of every configuration
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
