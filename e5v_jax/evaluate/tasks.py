"""The names that ``--tasks`` takes, and running what they stand for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from e5v_jax import cli
from e5v_jax.evaluate import composed, retrieval, sts
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.config import Protocol
from e5v_jax.evaluate.files import CheckText
from e5v_jax.evaluate.report import Report

Data = TypeVar("Data")


@dataclass(frozen=True, eq=False)
class Benchmark(Generic[Data]):
    """One or more tasks are scored together, as they share inputs or have an average.

    ``load`` reads the ``--data`` folder for a task, every ``--stride``-th item, and has its texts
    checked; it raises OSError or ValueError, naming file and row and what was expected. ``score``
    takes what was loaded, by task, and raises what :meth:`CachedEncoder.embed` does.
    """

    tasks: tuple[str, ...]
    load: Callable[[Path, str, int, CheckText], Data]
    score: Callable[[CachedEncoder, Mapping[str, Data], Protocol], Report]
    order: int = 0  # in tables; equal ones stand in the order of --tasks
    submits: str | None = None  # a file that is written to --output, which is then needed


_ALL: list[Benchmark[Any]] = [
    Benchmark(tuple(sts.TASKS), sts.load_task, sts.score, order=-1),
    *(Benchmark((task,), retrieval.load_task, retrieval.score) for task in retrieval.NAMES),
    Benchmark((composed.CIRR,), composed.load, composed.report_cirr),
    Benchmark((composed.CIRR_TEST,), composed.load, composed.submit, submits=composed.SUBMISSION),
    Benchmark(composed.FASHIONIQ_TASKS, composed.load, composed.report_fashioniq, order=1),
]
_GROUPS = {"sts": sts.PAPER_TASKS, "fashioniq": composed.FASHIONIQ_TASKS}  # words for several
TASKS = {task: benchmark for benchmark in _ALL for task in benchmark.tasks}


def choose_tasks(text: str) -> list[str]:
    """Return the tasks asked for, each once, in order. Raises cli.UsageError: none, or unknown."""
    names: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        if word not in _GROUPS and word not in TASKS:
            known = ", ".join([*_GROUPS, *TASKS])
            raise cli.UsageError(f"--tasks: unknown task {word!r}, expected of {known}")
        names += _GROUPS.get(word, (word,))
    if not names:
        raise cli.UsageError("--tasks: no task given")
    return list(dict.fromkeys(names))


def run_tasks(encoder: CachedEncoder, data: Mapping[str, Any], *, protocol: Protocol) -> Report:
    """Score ``data``, loaded tasks by name; raises what :meth:`CachedEncoder.embed` does."""
    result = Report({}, [])
    benchmarks = dict.fromkeys(TASKS[name] for name in data)
    for benchmark in sorted(benchmarks, key=lambda benchmark: benchmark.order):
        part = {name: items for name, items in data.items() if TASKS[name] is benchmark}
        found = benchmark.score(encoder, part, protocol)
        result.rows.extend(found.rows)
        result.scores.extend(found.scores)
        result.submissions.extend(found.submissions)
    return result
