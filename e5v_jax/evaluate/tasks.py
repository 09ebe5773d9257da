"""The names that ``--tasks`` takes, and running what they stand for."""

from collections.abc import Mapping
from typing import Any

from e5v_jax import cli
from e5v_jax.evaluate import composed, retrieval, sts
from e5v_jax.evaluate.benchmark import Benchmark, Protocol, Result
from e5v_jax.evaluate.cached_encoder import CachedEncoder

_ALL: list[Benchmark[Any]] = [sts.BENCHMARK, *retrieval.BENCHMARKS, *composed.BENCHMARKS]
TASKS = {task: benchmark for benchmark in _ALL for task in benchmark.tasks}
_GROUPS = {name: tasks for benchmark in _ALL for name, tasks in benchmark.groups.items()}


def choose_tasks(text: str) -> list[str]:
    """Return the task names that ``--tasks`` asks for, each once, in the order given.

    Raises:
        cli.UsageError: a name is unknown, or there is none.
    """
    names: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in _GROUPS and word not in TASKS:
            known = ", ".join([*_GROUPS, *TASKS])
            raise cli.UsageError(f"--tasks: unknown task {word!r}, expected of {known}")
        names += _GROUPS.get(word, (word,))
    if not names:
        raise cli.UsageError("--tasks: no task given")
    return list(dict.fromkeys(names))


def run_tasks(encoder: CachedEncoder, data: Mapping[str, Any], *, protocol: Protocol) -> Result:
    """Score all tasks; ``data`` is what their benchmarks loaded, by task.

    Raises:
        ValueError: see :meth:`CachedEncoder.embed`.
    """
    result = Result()
    benchmarks = dict.fromkeys(TASKS[name] for name in data)
    for benchmark in sorted(benchmarks, key=lambda benchmark: benchmark.order):
        part = {name: items for name, items in data.items() if TASKS[name] is benchmark}
        found = benchmark.score(encoder, part, protocol)
        result.rows += found.rows
        result.scores += found.scores
        result.submissions += found.submissions
    return result
