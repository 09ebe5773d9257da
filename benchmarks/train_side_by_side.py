"""The same training steps in two ways, in turns: their losses must agree, then their table."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from encode_side_by_side import SIDES, Side, print_table, summarize, take_turns

Args = TypeVar("Args")


def take_steps(
    prepare: Callable[[Args, Path], None], args: Args, *, steps: int, turn: int, threads: int
) -> dict[Side, list[dict[str, Any]]]:
    """Let both sides run ``steps`` steps, ``turn`` at a time, on so many CPUs each.

    ``prepare`` writes what they need into the folder that they are told by ``--folder``. Returns
    what each says of each step.

    Raises:
        SystemExit: preparing or a side failed.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA's threads too
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own: the sides' peak memory would begin at that of their parent
        preparing = get_context("spawn").Process(target=prepare, args=(args, Path(folder)))
        preparing.start()
        preparing.join()
        if preparing.exitcode:
            raise SystemExit("preparing failed")
        return take_turns(steps, "--folder", folder, turn=turn)


def print_steps(
    kind: str, count: int, answers: dict[Side, list[dict[str, Any]]], *, turn: int
) -> None:
    """Print the losses of both sides and, for ``count`` things of a kind a step, their table.

    Raises:
        SystemExit: losses differ by more than 1e-3.
    """
    losses = {side: [answer["loss"] for answer in answers[side]] for side in SIDES}
    for side in SIDES:
        print(f"losses, {side}: " + " ".join(f"{loss:.5f}" for loss in losses[side]))
    difference = np.abs(np.subtract(losses["e5v-jax"], losses["transformers"])).max()
    print(f"largest difference of a step's losses: {difference:.1e}")
    results = {side: summarize(answers[side], turn) for side in SIDES}
    for result in results.values():
        del result.notes["loss"]
        result.notes["median step"] = f"{np.median(result.seconds):.2f} s"
    print_table(kind, count, results)
    if not difference <= 1e-3:
        raise SystemExit(f"losses differ by {difference:.1e}: the sides did not do the same work")
