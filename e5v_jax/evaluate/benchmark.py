"""What the evaluate command needs to know of a benchmark."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.report import Row
from e5v_jax.evaluate.scores import Score

Data = TypeVar("Data")
Protocol = Literal["paper", "plain"]
"""The values of ``--protocol``."""


class Submission(NamedTuple):
    """These are answers to a test set whose scores only its organisers can tell."""

    file: str
    server: str  # where the file is to be sent
    content: Mapping[str, object]  # what the file holds, as JSON


@dataclass
class Result:
    """This is what was measured."""

    rows: list[Row] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Benchmark(Generic[Data]):
    """One or more tasks are scored together, as they share inputs or have an average.

    ``load`` reads the ``--data`` folder for a task, every ``--stride``-th item, and raises OSError
    or ValueError, naming file and row and what was expected. ``score`` takes what was loaded, by
    task, and raises what :meth:`CachedEncoder.embed` does.
    """

    tasks: tuple[str, ...]  # the names that --tasks takes
    load: Callable[[Path, str, int], Data]
    score: Callable[[CachedEncoder, Mapping[str, Data], Protocol], Result]
    # words that --tasks takes for several tasks at once
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    order: int = 0  # in tables; equal ones stand in the order of --tasks
    submits: str | None = None  # a file that is written to --output, which is then needed
