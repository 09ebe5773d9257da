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
    """Answers to a test set whose scores only its organisers can tell."""

    file: str
    server: str
    """Where the file is to be sent."""
    content: Mapping[str, object]
    """What the file holds, as JSON."""


@dataclass
class Result:
    """This is what was measured."""

    rows: list[Row] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    submissions: list[Submission] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Benchmark(Generic[Data]):
    """One or more tasks that are scored together, as they share inputs or have an average."""

    tasks: tuple[str, ...]
    """The names that ``--tasks`` takes."""
    load: Callable[[Path, str, int], Data]
    """Reads the ``--data`` folder for a task, every ``--stride``-th item; raises OSError or
    ValueError, naming file and row and what was expected."""
    score: Callable[[CachedEncoder, Mapping[str, Data], Protocol], Result]
    """Scores what was loaded, by task; raises what :meth:`CachedEncoder.embed` does."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that ``--tasks`` takes for several tasks at once."""
    order: int = 0
    """Tables show a benchmark after those with less; equal ones in the order of ``--tasks``."""
    submits: str | None = None
    """A file that is written to ``--output``, which is then needed."""
