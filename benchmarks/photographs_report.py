"""Tables and a plot of the runs that benchmarks/photographs.py has made so far."""

import json
from pathlib import Path
from typing import Any

from e5v_jax.evaluate.report import markdown_table, read_scores
from e5v_jax.evaluate.scores import Score, compare, summarise

METRICS = [f"{side} R@{k}" for side in ("image", "text") for k in (1, 5, 10)]
"""Of captions that look for their photograph, and of photographs that look for a caption."""
_COLOURS = {"image R@10": "#0072B2", "text R@10": "#D55E00"}  # for colour-blind readers, too


def write_report(out: Path) -> None:
    """Write ``tables.md`` and, with two lengths of training or more, ``photographs.png``."""
    scores = _read(out)
    if "aligned" not in scores:
        return
    parts = ["Scores, with 95 % intervals:", _scores_table(scores)]
    if others := [name for name in scores if name != "aligned"]:
        parts += ["Minus the aligned model's, paired:", _differences(scores, others)]
    if trained := [name for name in others if (out / name / "metrics.jsonl").exists()]:
        parts += ["What training took:", _costs(out, trained)]
    (out / "tables.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _draw(scores, out / "photographs.png")


def _read(out: Path) -> dict[str, dict[str, Score]]:
    """Of each run that is scored on retrieval, in order, the score of each metric."""
    found: dict[str, dict[str, Score]] = {}
    for folder in out.glob("retrieval-*"):
        name = folder.name.partition("-")[2]
        rows = read_scores(folder)
        if (sts := out / f"stsb-{name}").exists():
            rows += read_scores(sts)
        found[name] = {score.metric: score for score in rows}

    def place(name: str) -> tuple[Any, ...]:
        kind, *numbers = name.split("-")
        return ("fresh", "aligned", "text", "image").index(kind), *map(int, numbers)

    return {name: found[name] for name in sorted(found, key=place)}


def _scores_table(scores: dict[str, dict[str, Score]]) -> str:
    def cell(score: Score | None) -> str:
        return "" if score is None else "{:.1f} ({:.1f} to {:.1f})".format(*summarise([score]))

    columns = _columns(scores)
    rows = [[name, *(cell(own.get(column)) for column in columns)] for name, own in scores.items()]
    return markdown_table(["run", *columns], rows)


def _differences(scores: dict[str, dict[str, Score]], names: list[str]) -> str:
    def cell(name: str, column: str) -> str:
        before, after = scores["aligned"].get(column), scores[name].get(column)
        if before is None or after is None:
            return ""
        found = compare(before, after)
        return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"

    columns = _columns(scores)
    rows = [[name, *(cell(name, column) for column in columns)] for name in names]
    return markdown_table(["run", *columns], rows)


def _columns(scores: dict[str, dict[str, Score]]) -> list[str]:
    others = {metric for own in scores.values() for metric in own if metric not in METRICS}
    return [*METRICS, *sorted(others)]


def _costs(out: Path, names: list[str]) -> str:
    rows = []
    for name in names:
        lines = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "seconds_per_step" in line]
        seconds = sorted(line["seconds_per_step"] for line in steps[1:])  # the first one compiles
        middle = seconds[len(seconds) // 2]
        minutes = middle * len(steps) / 60
        rows.append([name, str(len(steps)), f"{middle:.1f}", f"{minutes:.1f}"])
    return markdown_table(["run", "steps", "seconds a step", "minutes"], rows)


def _draw(scores: dict[str, dict[str, Score]], file: Path) -> None:
    """Draw recall@10 both ways over the steps of text-only training, 0 for the aligned model."""
    steps = {
        name: int(name.split("-")[1])
        for name in scores
        if name.startswith("text-") and name.endswith("-0")
    }
    if len(steps) < 2:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    line = ["aligned", *sorted(steps, key=lambda name: steps[name])]
    for metric, colour in _COLOURS.items():
        found = [summarise([scores[name][metric]]) for name in line]
        x = [steps.get(name, 0) for name in line]
        middle = [value for value, _, _ in found]
        ends = [[v - low for v, low, _ in found], [high - v for v, _, high in found]]
        who = (
            "caption finds photograph" if metric.startswith("image") else "photograph finds caption"
        )
        axis.errorbar(x, middle, yerr=ends, color=colour, marker="o", capsize=3,
                      label=f"{who}: text-only training")  # fmt: skip
        images = [name for name in scores if name.startswith("image-")]
        for name in images:
            value, low, high = summarise([scores[name][metric]])
            at = [int(name.split("-")[1])]
            axis.errorbar(at, [value], yerr=[[value - low], [high - value]], color=colour,
                          marker="s", mfc="white", capsize=3,
                          label=f"{who}: photographs with captions")  # fmt: skip
    axis.set(xlabel="contrastive steps after alignment", ylabel="recall@10 among 500, %", ylim=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)
