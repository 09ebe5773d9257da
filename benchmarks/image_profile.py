"""Where the time of embedding photographs goes on a CPU: tower, decoder, and attention in each.

    python benchmarks/image_profile.py --images shared/data/flickr8k --limit 6

The random LLaVA-NeXT of encode_images.py, in fp32. Each part is what a run takes less without it:
the model is run whole, with attention in the decoder replaced by an addition, and in the tower too.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import encode_images
import jax
import numpy as np
import tyro

from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.from_hf import Args as ConvertArgs
from e5v_jax.checkpoints.from_hf import convert
from e5v_jax.dryrun.flops import count_forward
from e5v_jax.families.llava_next.config import LlavaNextConfig

PARTS = ("attention of the decoder", "attention of the tower", "linear maps and all else")


@dataclass(frozen=True)
class Args:
    """Take the embedding of photographs apart by time."""

    images: Path
    """Folder that is searched for .jpg files."""
    limit: int = 6
    """Only so many images, spread over all."""
    repetitions: int = 3
    """Timed runs of each, after one that is not timed."""
    tiny: bool = False
    """A model small enough for a test."""


def no_attention(q: jax.Array, k: jax.Array, v: jax.Array, **how: object) -> jax.Array:
    """An addition in place of attention, [B, T, N, H], that needs all of its operands."""
    first = q.shape[1]  # the last layer has one query
    return q + k[:, :first, :1] + v[:, :first, :1]


def seconds(folder: Path, images: list[Path], without: tuple[str, ...], repetitions: int) -> float:
    """The median time of embedding the images without the attention of the modules named."""
    patches = [mock.patch(f"e5v_jax.nn.{module}.attention", no_attention) for module in without]
    for patch in patches:
        patch.start()
    try:
        model = E5V.from_pretrained(folder, dtype="float32")
        times = []
        for _ in range(1 + repetitions):
            start = time.perf_counter()
            model.encode(images, show_progress_bar=False)
            times.append(time.perf_counter() - start)
    finally:
        for patch in patches:
            patch.stop()
    return float(np.median(times[1:]))


def floating_point_operations(folder: Path, images: list[Path]) -> dict[str, float]:
    """What each part computes for the images by hand, padding left out."""
    model = E5V.from_pretrained(folder, dtype="float32")
    base = ConvertedFolder(folder)
    config = base.config
    assert isinstance(config, LlavaNextConfig)
    tower = config.vision
    measured = model.processor.measure(list(images), model.preset.choose())
    total = dict.fromkeys(PARTS, 0.0)
    for item in measured:
        count = count_forward(
            base.family,
            base.config,
            rows=1,
            length=item.length,
            shape_key=item.shape_key,
            causal_half=True,
            pooled_only=True,
        )
        scores = 4.0 * config.num_vision_layers * tower.hidden_size * tower.num_positions**2
        total["attention of the decoder"] += count.attention
        total["attention of the tower"] += item.shape_key * scores
        total["linear maps and all else"] += count.decoder + count.vision
        total["linear maps and all else"] -= item.shape_key * scores
    return total


def main(args: Args) -> None:
    """Print a table: a row for each part."""
    images = encode_images.find_images(encode_images.Args(args.images, limit=args.limit))
    with tempfile.TemporaryDirectory() as temporary:
        hf, folder = Path(temporary) / "hf", Path(temporary) / "converted"
        encode_images.make_model(hf, tiny=args.tiny)
        convert(ConvertArgs(str(hf), folder))
        run = partial(seconds, folder, images, repetitions=args.repetitions)
        whole, no_scores, linear = (
            run(without=names) for names in ((), ("decoder",), ("decoder", "vision_tower"))
        )
        work = floating_point_operations(folder, images)
    taken = dict(zip(PARTS, (whole - no_scores, no_scores - linear, linear), strict=True))
    print(f"{len(images)} images in {whole:.2f} s, {len(os.sched_getaffinity(0))} CPUs, fp32\n")
    print("| part | s | share | GFLOP | GFLOP/s |\n|---|---|---|---|---|")
    for part, time_of in taken.items():
        share, flops = 100 * time_of / whole, work[part] / 1e9
        print(f"| {part} | {time_of:.2f} | {share:.0f} % | {flops:.0f} | {flops / time_of:.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
