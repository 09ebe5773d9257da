"""What ``python -m e5v_jax.train`` is told: a run, and whether its plan is to be searched for."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from e5v_jax.train.config import TrainConfig


@dataclass(frozen=True)
class TrainCommand:
    __doc__ = TrainConfig.__doc__

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    plan: Literal["auto"] | None = None
    """auto: mesh, chunk_size and remat are not those given but the fastest that fit this machine's
    TPUs or GPUs, by python -m e5v_jax.dryrun plan."""
