"""``python -m e5v_jax.evaluate --model DIR --tasks sts,flickr30k --data DIR``."""

import json
import sys
import time
from contextlib import nullcontext

from e5v_jax import __version__, cli
from e5v_jax.evaluate.analyse import AnalyseArgs, analyse
from e5v_jax.evaluate.compare import compare_runs
from e5v_jax.evaluate.config import EvaluateConfig
from e5v_jax.evaluate.report import Report, print_report, write_report


def evaluate(args: EvaluateConfig) -> None:
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
    for field in ("stride", "batch_size", "fsdp", "tensor"):
        if (value := getattr(args, field)) < 1:
            flag = field.replace("_", "-")
            raise cli.UsageError(f"--{flag}: {value}, expected at least 1")
    if args.model is None or args.data is None:
        missing = "--model" if args.model is None else "--data"
        raise cli.UsageError(f"{missing}: needed to evaluate (--help says what it is)")
    if "cirr-test" in names and args.output is None:
        raise cli.UsageError("--output: cirr-test writes cirr-submission.json there, give a folder")
    # Before the model: it takes minutes to load, bad data should not wait for it.
    data = {name: load_data(args.data, name, stride=args.stride) for name in names}

    import jax

    from e5v_jax.atomic import new_folder
    from e5v_jax.evaluate.embedding import open_embedder

    with nullcontext() if args.output is None else new_folder(args.output) as folder:
        embedder = open_embedder(
            args.model,
            dtype=args.dtype,
            adapter=args.adapter,
            template=args.template,
            batch_size=args.batch_size,
            cache=args.cache,
            quantize=args.quantize,
            fsdp=args.fsdp,
            tensor=args.tensor,
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
                "quantize": args.quantize,
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
    default, argv = cli.split_config(sys.argv[1:], EvaluateConfig)
    cli.run(evaluate, EvaluateConfig, default=default, argv=argv)
