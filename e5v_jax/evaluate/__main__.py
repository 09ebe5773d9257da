"""``python -m e5v_jax.evaluate --model DIR --tasks sts --data DIR``."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from e5v_jax import __version__, cli
from e5v_jax.evaluate.report import Report, print_report, write_report
from e5v_jax.evaluate.sts import (
    PAPER_TASKS,
    TASKS,
    clean_sentence,
    load_task,
    report_rows,
    score_tasks,
)


@dataclass(frozen=True)
class Args:
    """Score a model on the benchmarks of the paper and show the scores beside the paper's."""

    model: str
    """Converted folder, Hugging Face folder or GGUF file, or a hub id."""
    data: Path
    """Folder with the benchmarks: STS/ and SICK/ in SentEval's layout."""
    tasks: str = "sts"
    """Comma-separated: sts (the seven of the paper), or single ones: sts12, sts13, sts14, sts15,
    sts16, stsb, sickr, stsb-dev."""
    stride: int = 1
    """Score every n-th pair only: a quick look, not comparable with the paper."""
    protocol: Literal["paper", "plain"] = "paper"
    """paper: prompt `sts`, sentences cleaned as the authors do. plain: the instruction without
    spaces around it, sentences as they stand in the files; not comparable with the paper."""
    output: Path | None = None
    """Folder to write results.json and results.md to; must be empty or not exist."""
    adapter: Path | None = None
    """LoRA to apply: a run folder of e5v_jax.train, one of its checkpoints, or a PEFT folder."""
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default told from the model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    batch_size: int = 32
    """Sentences per device batch."""


def choose_tasks(text: str) -> list[str]:
    """The task names that ``--tasks`` asks for, each once, in the order given.

    Raises:
        cli.UsageError: an unknown name, or none.
    """
    names: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word != "sts" and word not in TASKS:
            raise cli.UsageError(
                f"--tasks: unknown task {word!r}, expected sts or of {', '.join(TASKS)}"
            )
        names += PAPER_TASKS if word == "sts" else [word]
    if not names:
        raise cli.UsageError("--tasks: no task given")
    return list(dict.fromkeys(names))


def evaluate(args: Args) -> None:
    """Evaluate and print; ``args.output`` appears only when whole.

    Raises:
        cli.UsageError: a flag with a value that cannot be.
        ValueError, FileNotFoundError, FileExistsError: one line naming file, row or folder.
    """
    names = choose_tasks(args.tasks)
    for flag, value in (("--stride", args.stride), ("--batch-size", args.batch_size)):
        if value < 1:
            raise cli.UsageError(f"{flag}: {value}, expected at least 1")
    # Before the model: it takes minutes to load, bad data should not wait for it.
    tasks = {name: load_task(args.data, name, stride=args.stride) for name in names}

    # Here, not above: they load JAX, which --help and the errors so far do not need.
    import jax

    from e5v_jax import E5V
    from e5v_jax.converted import new_folder
    from e5v_jax.prompts import TEMPLATES

    if args.template is not None and args.template not in TEMPLATES:
        raise cli.UsageError(
            f"--template: unknown {args.template!r}, expected one of {', '.join(TEMPLATES)}"
        )
    paper = args.protocol == "paper"
    prompt_name = "sts" if paper else "plain"
    with nullcontext() if args.output is None else new_folder(args.output) as folder:
        model = E5V.from_pretrained(
            args.model, dtype=args.dtype, adapter=args.adapter, template=args.template
        )

        def encode(sentences: list[str]) -> np.ndarray:
            return model.encode(sentences, prompt_name=prompt_name, batch_size=args.batch_size)

        start = time.perf_counter()
        scores = score_tasks(encode, tasks, clean=clean_sentence if paper else str.strip)
        seconds = time.perf_counter() - start
        report = Report(
            settings={
                "model": args.model,
                "adapter": None if args.adapter is None else str(args.adapter),
                "template": model.template,
                "protocol": args.protocol,
                "prompt": prompt_name,
                "dtype": args.dtype,
                "batch size": args.batch_size,
                "stride": args.stride,
                "device": jax.devices()[0].device_kind,
                "seconds": round(seconds, 1),
                "e5v-jax": __version__,
                "jax": jax.__version__,
            },
            rows=report_rows(scores, comparable=paper),
        )
        print_report(report)  # first: a full disk must not cost the scores
        if folder is not None:
            write_report(report, folder)


if __name__ == "__main__":
    cli.run(evaluate, Args)
