"""Scores with intervals beside the paper's or another run's: a table, Markdown and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from e5v_jax.atomic import new_folder
from e5v_jax.evaluate.published import PAPER, PUBLISHED, Published
from e5v_jax.evaluate.scores import RESAMPLES, Hits, Pairs, Score, compare, summarise

_HEADINGS = ("task", "metric", "items", "score", "95 % interval")
_PUBLISHED_HEADINGS = {
    "paper": "paper",
    "prompt_only": "paper, prompt only",
    "clip": "CLIP ViT-L",
    "eva_clip": "EVA-02-CLIP 5B",
    "blip": "BLIP ViT-L",
}
_COMPARED = ("task", "metric", "A", "B", "B - A", "95 % interval", "p")
_FIRST_NUMBER = 2  # column
_NOTE = f"percent; paper and baselines: E5-V (Llama-3-8B) and others as in {PAPER}"
_COMPARED_NOTE = f"percent; paired bootstrap over the items, {RESAMPLES} resamples, two-sided p"


@dataclass(frozen=True)
class Row:
    """This is one figure; all figures are in percent."""

    task: str  # key for programs
    label: str  # name for readers
    metric: str
    items: str  # what it was measured on, as "1379" or "300 of 1500"
    value: float
    low: float  # ends of the 95 % bootstrap interval
    high: float
    published: Published = field(default_factory=Published)


class Submission(NamedTuple):
    """These are answers to a test set whose scores only its organisers can tell."""

    file: str
    server: str  # where the file is to be sent
    content: Mapping[str, object]  # what the file holds, as JSON


@dataclass(frozen=True)
class Report:
    """This has the figures of one evaluation, and all that is needed to get them again."""

    settings: Mapping[str, str | int | float | None]
    rows: list[Row]
    scores: list[Score] = field(default_factory=list)  # the same item by item, to compare runs by
    submissions: list[Submission] = field(default_factory=list)


def make_row(task: str, label: str, items: str, scores: Sequence[Score], comparable: bool) -> Row:
    """Make the row of a score, or of the mean of several tasks' with one metric.

    Published figures stand beside it only if ``comparable``: measured as the paper does.
    """
    metric = scores[0].metric
    published = PUBLISHED.get((task, metric)) if comparable else None
    return Row(task, label, metric, items, *summarise(scores), published or Published())


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells; figures of others than the paper only if there are any."""
    shown = {
        name: heading
        for name, heading in _PUBLISHED_HEADINGS.items()
        if heading.startswith("paper")
        or any(getattr(row.published, name) is not None for row in rows)
    }
    cells = []
    for row in rows:
        figures = [getattr(row.published, name) for name in shown]
        published = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        ours = [f"{row.value:.2f}", f"{row.low:.2f} to {row.high:.2f}"]
        cells.append([row.label, row.metric, row.items, *ours, *published])
    return [*_HEADINGS, *shown.values()], cells


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Write the table as Markdown; numbers are right-aligned from the third column on."""
    rules = ["---" if number < _FIRST_NUMBER else "---:" for number in range(len(headings))]
    rows = ([cell.replace("|", r"\|") for cell in row] for row in [headings, rules, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def settings_table(settings: Mapping[str, str | int | float | None]) -> str:
    """Write what a result depends on as Markdown."""
    cells = [[name, "" if value is None else str(value)] for name, value in settings.items()]
    return markdown_table(["setting", "value"], cells)


def to_markdown(report: Report) -> str:
    """Write the settings and the figures as two tables."""
    blocks = [settings_table(report.settings), markdown_table(*_table(report.rows)), _NOTE + ".\n"]
    return "# Evaluation\n\n" + "\n".join(blocks)


def to_json(report: Report) -> str:
    """Write ``{"settings": {...}, "results": [{"task", "label", "metric", "value", ...}]}``."""
    content = {"settings": dict(report.settings), "results": [asdict(row) for row in report.rows]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def print_table(headings: Sequence[str], cells: Sequence[Sequence[str]], *, caption: str) -> None:
    """Print to the terminal; figures are never cut short, a narrow terminal wraps them."""
    table = Table(*headings, caption=caption)
    for column in table.columns[_FIRST_NUMBER:]:
        column.justify = "right"
    for row in cells:
        table.add_row(*row)
    console = Console()
    width = sum(max(map(len, column)) + 3 for column in zip(headings, *cells, strict=True))
    console.width = max(console.width, width + 1)
    console.print(table)


def print_report(report: Report) -> None:
    """Print the table to the terminal."""
    print_table(*_table(report.rows), caption=_NOTE)


def write_report(report: Report, folder: Path) -> None:
    """Write results.json, results.md, items.npz and submissions to ``folder``, which exists."""
    for name, text in (("results.json", to_json(report)), ("results.md", to_markdown(report))):
        # paths may have lone surrogates: what replaces them is JSON's escape, too
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    arrays: dict[str, np.ndarray] = {}
    for score in report.scores:
        key = f"{score.task}/{score.metric}"
        arrays[f"{key}/data"] = np.array(score.data)
        arrays |= {f"{key}/{name}": values for name, values in vars(score.items).items()}
    np.savez_compressed(folder / "items.npz", allow_pickle=False, **arrays)
    for name, _, content in report.submissions:
        (folder / name).write_text(json.dumps(content))


def read_scores(folder: Path) -> list[Score]:
    """Read the scores of a run's output folder, item by item.

    Raises FileNotFoundError: there is no ``items.npz``; ValueError: it is damaged.
    """
    path = folder / "items.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; expected the --output folder of an evaluation")
    scores = []
    try:
        with np.load(path, allow_pickle=False) as file, np.errstate(all="ignore"):
            for name in file:
                key, _, last = name.rpartition("/")
                if last == "data":
                    task, _, metric = key.partition("/")
                    kind = Hits if f"{key}/hits" in file else Pairs
                    items = kind(*(file[f"{key}/{part.name}"] for part in fields(kind)))
                    shapes = [array.shape for array in vars(items).values()]
                    if shapes != [(len(items),)] * len(shapes) or not np.isfinite(items.value()):
                        raise ValueError(f"{key}: arrays of shapes {shapes}, or no finite score")
                    scores.append(Score(task, metric, items, str(file[name])))
    except Exception as error:  # zipfile, zlib and NumPy raise many types for a damaged file
        raise ValueError(f"{path}: damaged ({error}): run the evaluation again") from error
    return scores


def compare_runs(first: Path, second: Path, *, output: Path | None = None) -> None:
    """Print, and write to ``output``, the paired differences of what both runs measured.

    Raises FileNotFoundError, ValueError: a folder is no run, or the runs have nothing in common;
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
    print_table(_COMPARED, cells, caption=f"A: {first}, B: {second}; {_COMPARED_NOTE}")
    for folder, run in zip(folders, runs, strict=True):
        only = dict.fromkeys(task for task, metric in run if (task, metric) not in common)
        if only:
            print(f"only in {folder}: {', '.join(only)}")
    if output is not None:
        with new_folder(output) as folder:
            content = {"a": str(first), "b": str(second), "results": results}
            (folder / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")
            text = f"# Comparison\n\nA: {first}, B: {second}\n\n{markdown_table(_COMPARED, cells)}"
            (folder / "comparison.md").write_text(f"{text}\n{_COMPARED_NOTE}.\n", encoding="utf-8")
