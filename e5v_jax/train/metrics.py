"""What a run says of itself: metrics.jsonl, TensorBoard events, wandb and one live line."""

import importlib
import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from e5v_jax.atomic import write_whole
from e5v_jax.checkpoints.adapters import read_run_info
from e5v_jax.distributed import is_first
from e5v_jax.storage import in_bucket, upload


class MetricsLog:
    """It writes ``metrics.jsonl`` and TensorBoard events, and shows progress on a terminal.

    On resume, what comes after ``start_step`` is dropped. Only the first process writes. As buckets
    cannot be appended to, files are uploaded there every 30 s, at checkpoints and at the end.
    """

    def __init__(
        self,
        run: Path,
        start_step: int,
        total_steps: int,
        *,
        unit: str = "triplets",
        wandb_project: str | None = None,
    ) -> None:
        """Open the logs; ``unit`` is what a batch holds, as the speed is told.

        Raises ImportError: a wandb project is given, wandb is not installed.
        """
        self._unit = unit
        self._writes = is_first()
        self._live = self._writes and sys.stderr.isatty()
        done = (MofNCompleteColumn(), BarColumn())
        columns = ("step", *done, "{task.description}", TimeRemainingColumn())
        self._progress = Progress(*columns, disable=not self._live)
        self._task = self._progress.add_task("compiling", total=total_steps, completed=start_step)
        self._total = total_steps
        self._restart()
        if not self._writes:
            return
        self._wandb = None if wandb_project is None else _open_wandb(wandb_project, run)
        self._run, self._uploaded = run, time.monotonic()
        self._spool = tempfile.TemporaryDirectory() if in_bucket(run) else None
        folder = Path(self._spool.name) if self._spool else run
        before, path = run / "metrics.jsonl", folder / "metrics.jsonl"
        kept = []
        for line in before.read_bytes().splitlines() if before.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # a kill cut the line off
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + b"\n")
        write_whole(path, lambda file: file.writelines(kept))  # a kill in here must not cost these
        self._file = path.open("a", buffering=1)  # a line is on disk once it is written
        from tensorboardX import SummaryWriter  # imports torch where it is installed: 2 s

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._writes:
            self._file.close()
            self._events.close()
            self.upload()
            if self._spool:
                self._spool.cleanup()
            if self._wandb is not None:
                self._wandb.finish()

    def add(
        self, step: int, values: dict[str, float], *, rows: int, tokens: int, due: bool
    ) -> None:
        """Count a finished step of so many rows and tokens, padding not counted; show its loss.

        If ``due``, append ``values`` and the speed since the last line, printed without a terminal.
        """
        self._steps += 1
        self._tokens += tokens
        elapsed = time.perf_counter() - self._since
        speed = {
            f"{self._unit}_per_s": self._steps * rows / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "seconds_per_step": elapsed / self._steps,
        }
        rate, tokens_rate = speed[f"{self._unit}_per_s"], speed["tokens_per_s"]
        text = f"loss {values['loss']:.4f}  {rate:.1f} {self._unit}/s  {tokens_rate:.0f} tokens/s"
        self._progress.update(self._task, completed=step, description=text)
        if not due:
            return
        self._append(step, {**values, **speed})
        if self._writes and not self._live:
            left = f"ETA {(self._total - step) * speed['seconds_per_step'] / 60:.1f} min"
            print(f"step {step}/{self._total}  {text}  {left}", file=sys.stderr, flush=True)
        self._restart()

    def add_scores(self, step: int, values: dict[str, float]) -> None:
        """Append what a validation found after ``step``, and print it; its time is not theirs."""
        self._append(step, values)
        if self._writes:
            told = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            self._progress.console.print(f"step {step}/{self._total}  {told}")
        self._restart()

    def upload(self) -> None:
        """Bring all of it to the bucket, if the run is in one."""
        if self._writes and self._spool:
            upload(Path(self._spool.name), self._run)
            self._uploaded = time.monotonic()

    def _restart(self) -> None:
        """Begin to measure the speed."""
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0

    def _append(self, step: int, values: dict[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()  # by itself only every two minutes, which a kill would take away
        if time.monotonic() > self._uploaded + 30:
            self.upload()
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _open_wandb(project: str, run: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")  # optional: most runs do without
    except ImportError:
        raise ImportError("wandb_project is set, but wandb is missing: pip install wandb") from None
    return wandb.init(project=project, name=run.name, id=read_run_info(run)["id"], resume="allow")
