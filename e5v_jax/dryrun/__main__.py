"""``python -m e5v_jax.dryrun train|plan|align|encode --topology v5e:4x8 ...``."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from e5v_jax.exits import guarded

if TYPE_CHECKING:
    from e5v_jax.dryrun.plan import Plans
    from e5v_jax.dryrun.report import Report
    from e5v_jax.dryrun.run import AlignDryRun, EncodeDryRun, TrainDryRun

USAGE = """usage: {} train|plan|align|encode --topology v5e:4x8 [flags]
What a step of training or alignment, or a batch of the encoder, needs on chips that are not here;
plan searches for the training flags that make it fastest.
The flags: python -m e5v_jax.dryrun train|plan|align|encode --help."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands; ``argv`` are its words, None takes the command line's."""
    # no accelerator of this machine has a part in it; and JAX would start its libtpu, if there is
    # one, before the flags that it has to compile with are known
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with guarded(argv) as words:
        import tyro  # here and below: they take seconds, and Ctrl-C may come meanwhile

        from e5v_jax import cli
        from e5v_jax.align.config import AlignConfig
        from e5v_jax.dryrun.plan import PlanDryRun, search_plans
        from e5v_jax.dryrun.run import (
            AlignDryRun,
            EncodeDryRun,
            TrainDryRun,
            report_align,
            report_encode,
            report_train,
        )
        from e5v_jax.train.config import TrainConfig

        command, *flags = words or [""]
        if command in ("train", "plan"):
            cfg, flags_left = cli.split_config(flags, TrainConfig)
            if cfg is None:
                cfg = TrainConfig(model=tyro.MISSING, output=Path("unused"))
            if command == "plan":
                cli.run(
                    lambda args: show(search_plans(args), args),
                    PlanDryRun,
                    default=PlanDryRun(run=cfg, topology=tyro.MISSING),
                    argv=flags_left,
                )
            cli.run(
                lambda args: show(report_train(args), args),
                TrainDryRun,
                default=TrainDryRun(run=cfg, topology=tyro.MISSING),
                argv=flags_left,
            )
        if command == "align":
            aligning, flags_left = cli.split_config(flags, AlignConfig)
            if aligning is None:
                aligning = AlignConfig(model=tyro.MISSING, output=Path("unused"))
            cli.run(
                lambda args: show(report_align(args), args),
                AlignDryRun,
                default=AlignDryRun(run=aligning, topology=tyro.MISSING),
                argv=flags_left,
            )
        if command == "encode":
            cli.run(lambda args: show(report_encode(args), args), EncodeDryRun, argv=flags)
        is_help = command in ("-h", "--help")
        print(USAGE.format(cli.program()), file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)


def show(report: "Report | Plans", args: "TrainDryRun | AlignDryRun | EncodeDryRun") -> None:
    """Print a report, or plans, as a table or as JSON."""
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        report.print()


if __name__ == "__main__":
    main()
