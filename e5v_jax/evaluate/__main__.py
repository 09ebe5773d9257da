"""``python -m e5v_jax.evaluate --model DIR --tasks sts,flickr30k --data DIR``."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from e5v_jax import __version__, cli
from e5v_jax.evaluate.analyse import analyse
from e5v_jax.evaluate.compare import compare_runs
from e5v_jax.evaluate.config import AnalyseArgs, EvaluateConfig
from e5v_jax.evaluate.report import Report, print_report, write_report


def evaluate(args: EvaluateConfig) -> None:
    """Evaluate and print; ``args.output`` appears only when whole.

    Raises:
        cli.UsageError: a flag has a value that cannot be.
        ValueError, FileNotFoundError, FileExistsError: one line naming file, row or folder.
    """
    if args.compare is not None:
        compare_runs(*args.compare, output=args.output)
        return
    # Here and below, not above: these load JAX and transformers, which --help does not need.
    from e5v_jax.evaluate.tasks import TASKS, choose_tasks, run_tasks

    names = choose_tasks(args.tasks)
    args.check()
    assert args.data is not None
    for name in names:
        if TASKS[name].submits and args.output is None:
            raise cli.UsageError(
                f"--output: {name} writes {TASKS[name].submits} there, give a folder"
            )
    # Before the model: it takes minutes to load, bad data should not wait for it.
    data = {name: TASKS[name].load(args.data, name, args.stride) for name in names}

    import jax

    from e5v_jax.atomic import new_folder

    with nullcontext() if args.output is None else new_folder(args.output) as folder:
        encoder = args.load_encoder()
        start = time.perf_counter()
        result = run_tasks(encoder, data, protocol=args.protocol)
        settings = {
            **args.describe(),
            "template": encoder.template,
            "protocol": args.protocol,
            "batch size": args.batch_size,
            "stride": args.stride,
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.perf_counter() - start, 1),
            "e5v-jax": __version__,
            "jax": jax.__version__,
        }
        report = Report(settings, result.rows, result.scores)
        if report.rows:
            print_report(report)  # first: a full disk must not cost the scores
        if folder is None:
            return
        write_report(report, folder)
        for file, server, content in result.submissions:
            (folder / file).write_text(json.dumps(content))
            print(f"{args.output}/{file}: for {server}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, or after the word ``analyse`` show the space; None takes the command line."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["analyse"]:
        cli.run(analyse, AnalyseArgs, argv=words[1:])
    default, words = cli.split_config(words, EvaluateConfig)
    cli.run(evaluate, EvaluateConfig, default=default, argv=words)


if __name__ == "__main__":
    main()
