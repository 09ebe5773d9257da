"""Two encoders, each in a process of its own, timed in turns on the same inputs; their table."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

Side = Literal["e5v-jax", "transformers"]
Run = Callable[[], np.ndarray]
"""One run: it returns vectors, or losses."""
Notes = Callable[[], dict[str, Any]]
"""What a side says of its runs so far."""
SIDES: tuple[Side, ...] = ("e5v-jax", "transformers")


@dataclass
class Result:
    """What one side did."""

    first_seconds: float
    """The first run, compilation included."""
    seconds: list[float]
    peak_bytes: int
    """Resident memory of its process at its highest."""
    notes: dict[str, Any]
    """Its own figures."""


def serve(open_side: Callable[[], tuple[Run, Notes]]) -> None:
    """Be one side: a run for each line on stdin, which names a file for the vectors or is empty."""
    with redirect_stdout(sys.stderr):  # stdout is for answers only
        encode, notes = open_side()
    for line in sys.stdin:
        start = time.perf_counter()
        vectors = encode()
        seconds = time.perf_counter() - start
        if line.strip():
            np.save(line.strip(), vectors)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        print(json.dumps({"seconds": seconds, "peak": peak, **notes()}), flush=True)


def take_turns(
    runs: int,
    *flags: str,
    sides: Sequence[Side] = SIDES,
    save: Path | None = None,
    turn: int = 1,
) -> dict[Side, list[dict[str, Any]]]:
    """Start this program once for each side (``--side``, and ``flags``), run them in turns.

    Returns what each says of each run (:func:`serve`). With ``save``, the vectors of the first run
    go to SIDE.npy there. A side has ``turn`` runs, then the other.

    Raises:
        SystemExit: a side failed.
    """
    command = [sys.executable, *sys.argv]
    children = {
        side: subprocess.Popen(
            [*command, *flags, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in sides
    }

    def run(side: Side, file: str) -> dict[str, Any]:
        child = children[side]
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(file + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"{side} failed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    answers: dict[Side, list[dict[str, Any]]] = {side: [] for side in sides}
    for i in range(0, runs, turn):
        for side in sides:
            for j in range(i, min(i + turn, runs)):
                file = str(save / f"{side}.npy") if save is not None and j == 0 else ""
                answers[side].append(run(side, file))
    for child in children.values():
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    return answers


def summarize(answers: list[dict[str, Any]], turn: int | None = None) -> Result:
    """The first run (of each ``turn``) apart; peak memory and notes are of the last answer."""
    return Result(
        answers[0]["seconds"],
        [answer["seconds"] for i, answer in enumerate(answers) if i % (turn or len(answers))],
        answers[-1]["peak"],
        {k: v for k, v in answers[-1].items() if k not in ("seconds", "peak")},
    )


def compare(repetitions: int, folder: Path, *flags: str) -> dict[Side, Result]:
    """One run of each side that is not timed, then ``repetitions``, in turns (:func:`take_turns`).

    Raises:
        SystemExit: a side failed.
    """
    answers = take_turns(1 + repetitions, *flags, save=folder)
    ours, theirs = (np.load(folder / f"{side}.npy") for side in SIDES)
    print(f"largest difference of two unit vectors' entries: {np.abs(ours - theirs).max():.1e}")
    return {side: summarize(answers[side]) for side in SIDES}


def print_table(kind: str, count: int, results: dict[Side, Result]) -> None:
    """Markdown: rates of the median run, peak memory, and what each side says of itself."""
    print(
        f"{count} {kind}, {os.cpu_count()} CPUs, {platform.machine()}, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers"))
    )
    print(f"\n| | {kind}/s (median) | all runs, s | first run, s | peak memory, MB | notes |")
    print("|---|---|---|---|---|---|")
    for side, result in results.items():
        runs = " ".join(f"{seconds:.2f}" for seconds in result.seconds)
        notes = ", ".join(f"{key} {value}" for key, value in result.notes.items())
        print(
            f"| {side} | {count / np.median(result.seconds):.2f} | {runs} | "
            f"{result.first_seconds:.2f} | {result.peak_bytes / 1e6:.0f} | {notes} |"
        )
    ratio = np.median(results["transformers"].seconds) / np.median(results["e5v-jax"].seconds)
    print(f"\ne5v-jax / transformers: {ratio:.2f}x")
