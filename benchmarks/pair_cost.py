"""What a training pair costs: two texts against an image and a text, through the same step.

    python benchmarks/pair_cost.py --data shared/data/flickr8k

Pairs are two captions of a photograph, and the photograph with a caption. LoRA r 16 in fp32 on a
random LLaVA-NeXT (the one of benchmarks/encode_images.py), or on --model; each kind in a process of
its own. FLOPs are counted in the traced step, "step memory" is what XLA plans for its intermediate
values, "peak memory" the whole process's. Table: docs/benchmarks.md.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from encode_images import make_model
from encode_side_by_side import Notes, Run, Side, serve, summarize, take_turns

Kind = Literal["text-text", "image-text"]
KINDS: tuple[Kind, ...] = ("text-text", "image-text")
OURS: Side = "e5v-jax"


@dataclass(frozen=True)
class Args:
    """Measure what both kinds of pairs cost."""

    data: Path
    """Folder with images/ and captions.jsonl: image, and at least two captions, on each line."""
    batch_size: int = 8
    """Pairs a step."""
    steps: int = 2
    """Timed steps, after one that is not."""
    model: Path | None = None
    """Converted folder of a LLaVA-NeXT; by default a random one is made."""
    tiny: bool = False
    """A random model small enough for a test."""
    kind: Kind | None = None
    """Measure this kind (the command starts itself so)."""
    pairs: Path | None = None
    """Its file (written by the command itself)."""
    side: Side | None = None
    """Be a process that measures (the command starts itself so)."""


def write_pairs(args: Args, kind: Kind, file: Path) -> None:
    """A jsonl file of the trainer's columns, absolute paths."""
    rows = []
    folder = args.data.absolute()
    for line in (folder / "captions.jsonl").read_text().splitlines():
        record = json.loads(line)
        first, second, *_ = record["captions"]
        image = folder / "images" / record["image"]
        texts = {"sent0": first, "sent1": second}
        rows.append(texts if kind == "text-text" else {"image0": str(image), "sent1": second})
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def open_kind(args: Args) -> tuple[Run, Notes]:
    """A function that runs one step, and its figures."""
    import jax

    from e5v_jax.checkpoints.converted import ConvertedFolder
    from e5v_jax.dryrun.flops import traced_flops
    from e5v_jax.nn.layers import LoRAConfig
    from e5v_jax.train.config import DataConfig, TrainConfig
    from e5v_jax.train.feed import load_data, place
    from e5v_jax.train.setup import set_up

    assert args.model is not None and args.pairs is not None
    cfg = TrainConfig(
        model=args.model,
        output=Path("unused"),
        data=DataConfig(path=(args.pairs,), length_groups=1),
        lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.0),
        batch_size=args.batch_size,
        dtype="float32",
    )
    training = set_up(cfg, ConvertedFolder(cfg.model), load_data(cfg.data))
    batch = next(training.feed.batches)
    key = jax.random.key(cfg.seed)
    arrays = (training.trainable, training.opt_state, training.frozen)
    step_fn: Any = training.step_fn  # jitted
    traced = step_fn.trace(*arrays, place(batch.arrays, training.runtime.mesh), key)
    flops = traced_flops(traced.jaxpr.jaxpr)
    compiled = traced.lower().compile()
    training.step_fn = compiled

    def step() -> np.ndarray:
        return np.array([float(training.step(batch, key).loss)], np.float32)  # waits for the step

    def notes() -> dict[str, Any]:
        return {
            "flops": flops,
            "step_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "lengths": " and ".join(map(str, training.feed.lengths)),
        }

    return step, notes


def main(args: Args) -> None:
    """Measure one kind, or start a process for each and print the table."""
    if args.side is not None:
        serve(lambda: open_kind(args))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model
        if model is None:
            from e5v_jax.checkpoints import from_hf

            make_model(folder / "hf", tiny=args.tiny)
            model = folder / "model"
            from_hf.convert(from_hf.Args(str(folder / "hf"), model))
        print(
            "| pair | padded lengths | GFLOP a pair | s a pair (median) | steps, s "
            "| step memory, MB a pair | peak memory, MB |"
        )
        print("|---|---|---|---|---|---|---|")
        costs = []
        for kind in KINDS:
            file = folder / f"{kind}.jsonl"
            write_pairs(args, kind, file)
            flags = ("--model", str(model), "--kind", kind, "--pairs", str(file))
            result = summarize(take_turns(1 + args.steps, *flags, sides=(OURS,))[OURS])
            notes, per = result.notes, args.batch_size
            seconds = float(np.median(result.seconds)) / per
            costs.append((notes["flops"] / per, seconds, notes["step_bytes"] / per))
            print(
                f"| {kind} | {notes['lengths']} | {notes['flops'] / per / 1e9:.0f} | "
                f"{seconds:.3f} | {' '.join(f'{s:.2f}' for s in result.seconds)} | "
                f"{notes['step_bytes'] / per / 1e6:.0f} | {result.peak_bytes / 1e6:.0f} |",
                flush=True,
            )
    flops, seconds, memory = (image / text for text, image in zip(*costs, strict=True))
    print(
        f"\nan image-text pair costs {flops:.1f} times the FLOPs of a text-text pair, "
        f"{seconds:.1f} times the time, {memory:.1f} times the step's memory"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
