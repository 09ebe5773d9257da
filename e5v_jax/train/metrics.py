"""What a run says of itself: metrics.jsonl, TensorBoard events and one live line."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricsLog:
    """Writes ``metrics.jsonl`` and TensorBoard events; shows progress on a terminal.

    On resume, lines and events after ``start_step`` are dropped, so every step appears once.
    """

    def __init__(self, run: Path, *, start_step: int, total_steps: int) -> None:
        self._path = run / "metrics.jsonl"
        kept = []
        if self._path.is_file():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= start_step]
        temporary = run / "metrics.jsonl.tmp"  # a kill in here must not cost the earlier lines
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.rename(self._path)
        self._file = self._path.open("a", buffering=1)  # a line is on disk once it is written
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self._live = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            disable=not self._live,
        )
        self._task = self._progress.add_task("compiling", total=total_steps, completed=start_step)
        self._total = total_steps

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._file.close()
        self._events.close()

    def show(self, step: int, loss: float, triplets_per_s: float, tokens_per_s: float) -> None:
        """Update the live line."""
        text = f"loss {loss:.4f}  {triplets_per_s:.1f} triplets/s  {tokens_per_s:.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=text)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line and its TensorBoard scalars; without a terminal, print it too."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()  # by itself only every two minutes, which a kill would take away
        if not self._live:
            remaining = (self._total - step) * values["seconds_per_step"]
            print(
                f"step {step}/{self._total}  loss {values['loss']:.4f}  "
                f"{values['triplets_per_s']:.1f} triplets/s  {values['tokens_per_s']:.0f} tokens/s"
                f"  ETA {remaining / 60:.1f} min",
                file=sys.stderr,
                flush=True,
            )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill
