"""What ``python -m e5v_jax.train`` is told: a run, and whether its plan is to be searched for."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train


@dataclass(frozen=True)
class TrainCommand:
    __doc__ = TrainConfig.__doc__

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    plan: Literal["auto"] | None = None
    """auto: mesh, chunk_size and remat are not those given but the fastest that fit this machine's
    TPUs or GPUs, by python -m e5v_jax.dryrun plan."""


def start(command: TrainCommand) -> None:
    """Train as the command says; raises as :func:`train` and :func:`plan_here`."""
    run = command.run
    if command.plan == "auto":
        # here: the dry run knows training, and not the other way round
        from e5v_jax.dryrun.here import plan_here

        run = plan_here(run)
    train(run)
