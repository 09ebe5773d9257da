"""Scores beside the paper's: a table in the terminal, Markdown and JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PAPER = "arXiv 2407.12580"
_HEADINGS = ("task", "metric", "items", "score", "paper", "paper, prompt only")
_FIRST_NUMBER = 2  # column


@dataclass(frozen=True)
class Row:
    """One figure. All figures in percent."""

    task: str
    """Key for programs."""
    label: str
    """Name for readers."""
    metric: str
    items: str
    """What it was measured on, as "1379" or "300 of 1500"."""
    value: float
    paper: float | None = None
    """The figure of E5-V in the paper, None if it has none."""
    paper_prompt_only: float | None = None
    """The paper's figure without fine-tuning."""


@dataclass(frozen=True)
class Report:
    """The figures of one evaluation, and all that is needed to get them again."""

    settings: Mapping[str, str | int | float | None]
    rows: list[Row]


def _cells(row: Row) -> list[str]:
    figures = (row.value, row.paper, row.paper_prompt_only)
    shown = ["" if figure is None else f"{figure:.2f}" for figure in figures]
    return [row.label, row.metric, row.items, *shown]


def to_table(report: Report) -> Table:
    """For the terminal."""
    table = Table(caption=f"percent; paper: E5-V (Llama-3-8B), {PAPER}")
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if number < _FIRST_NUMBER else "right")
    for row in report.rows:
        table.add_row(*_cells(row))
    return table


def to_markdown(report: Report) -> str:
    """Settings and figures as two tables."""
    rules = ["---" if number < _FIRST_NUMBER else "---:" for number in range(len(_HEADINGS))]
    settings = [
        [name, "" if value is None else str(value)] for name, value in report.settings.items()
    ]
    blocks = [
        _markdown_table([["setting", "value"], ["---", "---"], *settings]),
        _markdown_table([list(_HEADINGS), rules, *(_cells(row) for row in report.rows)]),
        f"Figures in percent; paper: E5-V (Llama-3-8B), {PAPER}.\n",
    ]
    return "# Evaluation\n\n" + "\n".join(blocks)


def to_json(report: Report) -> str:
    """``{"settings": {...}, "results": [{"task", "label", "metric", "items", "value", ...}]}``."""
    content = {"settings": dict(report.settings), "results": [asdict(row) for row in report.rows]}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def print_report(report: Report) -> None:
    """Print the table to the terminal."""
    Console().print(to_table(report))


def write_report(report: Report, folder: Path) -> None:
    """Write ``results.json`` and ``results.md`` into ``folder``, which exists."""
    (folder / "results.json").write_text(to_json(report), encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(report), encoding="utf-8")


def _markdown_table(rows: list[list[str]]) -> str:
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
