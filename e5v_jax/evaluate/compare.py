"""``python -m e5v_jax.evaluate --compare RUN_A RUN_B``: are two runs different?"""

import json
from pathlib import Path

from e5v_jax.atomic import new_folder
from e5v_jax.evaluate.report import markdown_table, print_table, read_scores
from e5v_jax.evaluate.scores import RESAMPLES, compare

_HEADINGS = ("task", "metric", "A", "B", "B - A", "95 % interval", "p")
_NOTE = f"percent; paired bootstrap over the items, {RESAMPLES} resamples, two-sided p"


def compare_runs(first: Path, second: Path, *, output: Path | None = None) -> None:
    """Print, and write to ``output``, the paired differences of what both runs measured.

    Raises:
        FileNotFoundError, ValueError: a folder is no run, or the runs have nothing in common.
        FileExistsError: ``output`` exists and is not empty.
    """
    folders = (first, second)
    runs = [{(score.task, score.metric): score for score in read_scores(f)} for f in folders]
    common = [key for key in runs[0] if key in runs[1]]
    if not common:
        a, b = (", ".join(dict.fromkeys(task for task, _ in run)) or "nothing" for run in runs)
        raise ValueError(f"nothing to compare: {first} has {a}, {second} has {b}")
    cells, results = [], []
    for key in common:
        scores = [run[key] for run in runs]
        before, after = (score.items.value() for score in scores)
        difference = compare(*scores)
        values = {"task": key[0], "metric": key[1], "a": before, "b": after}
        results.append({**values, **difference._asdict()})
        interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
        figures = [f"{before:.2f}", f"{after:.2f}", f"{difference.value:+.2f}"]
        cells.append([*key, *figures, interval, f"{difference.p:.4f}"])
    print_table(_HEADINGS, cells, caption=f"A: {first}, B: {second}; {_NOTE}")
    for folder, run in zip(folders, runs, strict=True):
        only = dict.fromkeys(task for task, metric in run if (task, metric) not in common)
        if only:
            print(f"only in {folder}: {', '.join(only)}")
    if output is not None:
        with new_folder(output) as folder:
            content = {"a": str(first), "b": str(second), "results": results}
            (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")
            text = f"# Comparison\n\nA: {first}, B: {second}\n\n{markdown_table(_HEADINGS, cells)}"
            (folder / "comparison.md").write_text(f"{text}\n{_NOTE}.\n", encoding="utf-8")
