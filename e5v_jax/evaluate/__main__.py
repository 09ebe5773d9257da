"""``python -m e5v_jax.evaluate --model DIR --tasks sts,flickr30k --data DIR``."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from e5v_jax import __version__, cli
from e5v_jax.evaluate.analyse import AnalyseArgs, analyse
from e5v_jax.evaluate.compare import compare_runs
from e5v_jax.evaluate.report import Report, print_report, write_report


@dataclass(frozen=True)
class Args:
    """Score a model on the benchmarks of the paper and show the scores beside the paper's.

    `python -m e5v_jax.evaluate analyse --help`: what the embedding space looks like.
    """

    model: str | None = None
    """Converted folder, Hugging Face folder or GGUF file, or a hub id."""
    data: Path | None = None
    """Folder with the benchmarks, laid out as docs/evaluation.md says; for `retrieval` and
    `i2i-retrieval` the one that holds captions.jsonl; `hub` fetches the authors' data sets."""
    tasks: str = "sts"
    """Comma-separated: sts (the seven of the paper) or single ones (sts12 to sts16, stsb, sickr,
    stsb-dev), flickr30k, coco, i2i-flickr30k, i2i-coco, cirr (validation), cirr-test (writes the
    submission for CIRR's server), fashioniq (its three types) or fashioniq-dress and so on,
    retrieval and i2i-retrieval (your own captioned images)."""
    compare: tuple[Path, Path] | None = None
    """Instead of all else: the outputs of two runs, to compare them item by item."""
    stride: int = 1
    """Score every n-th pair, image or query only: a quick look, not comparable with the paper."""
    protocol: Literal["paper", "plain"] = "paper"
    """Of STS. paper: prompt `sts`, sentences cleaned as the authors do. plain: the instruction
    without spaces around it, sentences as they stand in the files: not the paper's figure."""
    output: Path | None = None
    """Folder to write results.json, results.md and items.npz to; must be empty or not exist."""
    cache: Path | None = None
    """Folder to keep embeddings in: what is there for this model is not embedded again."""
    adapter: Path | None = None
    """LoRA to apply: a run folder of e5v_jax.train, one of its checkpoints, or a PEFT folder."""
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default told from the model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    batch_size: int = 32
    """Inputs per device batch."""


def evaluate(args: Args) -> None:
    """Evaluate and print; ``args.output`` appears only when whole.

    Raises:
        cli.UsageError: a flag with a value that cannot be.
        ValueError, FileNotFoundError, FileExistsError: one line naming file, row or folder.
    """
    if args.compare is not None:
        compare_runs(*args.compare, output=args.output)
        return
    # Here and below, not above: these load JAX and transformers, which --help does not need.
    from e5v_jax.evaluate.tasks import choose_tasks, load_data, run_tasks

    names = choose_tasks(args.tasks)
    for flag, value in (("--stride", args.stride), ("--batch-size", args.batch_size)):
        if value < 1:
            raise cli.UsageError(f"{flag}: {value}, expected at least 1")
    if args.model is None or args.data is None:
        missing = "--model" if args.model is None else "--data"
        raise cli.UsageError(f"{missing}: needed to evaluate (--help says what it is)")
    if "cirr-test" in names and args.output is None:
        raise cli.UsageError("--output: cirr-test writes cirr-submission.json there, give a folder")
    # Before the model: it takes minutes to load, bad data should not wait for it.
    data = {name: load_data(args.data, name, stride=args.stride) for name in names}

    import jax

    from e5v_jax.converted import new_folder
    from e5v_jax.evaluate.embedding import open_embedder

    with nullcontext() if args.output is None else new_folder(args.output) as folder:
        embedder = open_embedder(
            args.model,
            dtype=args.dtype,
            adapter=args.adapter,
            template=args.template,
            batch_size=args.batch_size,
            cache=args.cache,
        )
        start = time.perf_counter()
        result = run_tasks(embedder, data, protocol=args.protocol)
        seconds = time.perf_counter() - start
        report = Report(
            settings={
                "model": args.model,
                "adapter": None if args.adapter is None else str(args.adapter),
                "template": embedder.template,
                "protocol": args.protocol,
                "dtype": args.dtype,
                "batch size": args.batch_size,
                "stride": args.stride,
                "device": jax.devices()[0].device_kind,
                "seconds": round(seconds, 1),
                "e5v-jax": __version__,
                "jax": jax.__version__,
            },
            rows=result.rows,
            scores=result.scores,
        )
        if report.rows:
            print_report(report)  # first: a full disk must not cost the scores
        if folder is not None:
            write_report(report, folder)
            if result.submission is not None:
                (folder / "cirr-submission.json").write_text(json.dumps(result.submission))
                print(f"{args.output}/cirr-submission.json: for https://cirr.cecs.anu.edu.au")


if __name__ == "__main__":
    if sys.argv[1:2] == ["analyse"]:
        cli.run(analyse, AnalyseArgs, argv=sys.argv[2:])
    cli.run(evaluate, Args)
