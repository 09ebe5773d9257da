"""What ``python -m e5v_jax.evaluate`` does: load, score, print and write.

The functions import what they need: --help waits for neither JAX nor transformers.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NoReturn

from e5v_jax import __version__, cli
from e5v_jax.atomic import new_folder
from e5v_jax.evaluate.config import AnalyseArgs, EvaluateConfig
from e5v_jax.evaluate.golden import GoldenArgs, golden


def evaluate(args: EvaluateConfig) -> None:
    """Evaluate and print; ``args.output`` appears only when whole.

    Raises cli.UsageError: a flag has a value that cannot be; ValueError, FileNotFoundError,
    FileExistsError: one line naming file, row or folder.
    """
    if args.compare is not None:
        from e5v_jax.evaluate.report import compare_runs

        compare_runs(*args.compare, output=args.output)
        return
    from e5v_jax.evaluate.tasks import TASKS, choose_tasks, run_tasks

    names = choose_tasks(args.tasks)
    args.check()
    assert args.data is not None
    for name in names:
        if (submission := TASKS[name].submits) and args.output is None:
            raise cli.UsageError(f"--output: {name} writes {submission} there, give a folder")
    # Before the model: it takes minutes to load, bad data should not wait for it.
    check = args.text_check()
    data = {name: TASKS[name].load(args.data, name, args.stride, check) for name in names}

    import jax

    from e5v_jax.evaluate.report import print_report, write_report

    with nullcontext() if args.output is None else new_folder(args.output) as folder:
        encoder = args.load_encoder()
        start = time.perf_counter()
        report = run_tasks(encoder, data, protocol=args.protocol)
        settings = {
            **args.describe(),
            "preset": encoder.preset.name,
            "template": encoder.template,
            "protocol": args.protocol,
            "batch size": args.batch_size,
            "stride": args.stride,
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.perf_counter() - start, 1),
            "e5v-jax": __version__,
            "jax": jax.__version__,
        }
        report = replace(report, settings=settings)
        if report.rows:
            print_report(report)  # first: a full disk must not cost the scores
        if folder is not None:
            write_report(report, folder)
            for file, server, _ in report.submissions:
                print(f"{args.output}/{file}: for {server}")


def _analyse(args: AnalyseArgs) -> None:
    from e5v_jax.evaluate.analyse import analyse

    analyse(args)


def run(words: Sequence[str]) -> NoReturn:
    """Evaluate, or do what the first word says, ``analyse`` or ``golden``. It exits."""
    if words[:1] == ["analyse"]:
        cli.run(_analyse, AnalyseArgs, argv=words[1:])
    if words[:1] == ["golden"]:
        cli.run(golden, GoldenArgs, argv=words[1:])
    default, words = cli.split_config(words, EvaluateConfig)
    cli.run(evaluate, EvaluateConfig, default=default, argv=words)
