"""What kinds of training differ in: their data, their step, their score and what they leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.train.checkpoint import Score
from e5v_jax.train.setup import Training


class Rows(Protocol):
    """Training data in memory, or where its images are."""

    @property
    def row_ids(self) -> Sequence[str]:
        """Where a person finds each row."""

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of all that is trained on."""

    def __len__(self) -> int: ...


class Validation(Protocol):
    """It scores the parameters of a running training."""

    def score(self, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        """Compute the score that is the task's, by its name, and what else is worth a line."""


@dataclass(frozen=True)
class Task:
    """One kind of training, as functions of its configuration (a RunConfig of its own type)."""

    unit: str  # what a batch holds
    score: Score
    load_data: Callable[[Any], Rows]
    """Raises FileNotFoundError, ValueError: one line naming file and row, and what is wrong."""
    set_up: Callable[[Any, ConvertedFolder, Any], Training]
    """``(configuration, base, data)``; raises ValueError, as all that follow."""
    make_validation: Callable[[Any, Training], Validation | None]
    export: Callable[[Any, nnx.State, ConvertedFolder], None]
    """``(configuration, trained, base)``: writes what the run leaves."""
