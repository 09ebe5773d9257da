"""The figures of the paper (arXiv 2407.12580) that stand beside ours, in percent: published.csv.

CIRR is reported on the test set, whose answers only the organisers' server has: it has no row.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

PAPER = "arXiv 2407.12580"


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables; None where it reports nothing."""

    paper: float | None = None  # E5-V, Llama-3-8B
    prompt_only: float | None = None  # the same model before its fine-tuning
    clip: float | None = None  # CLIP ViT-L
    eva_clip: float | None = None  # EVA-02-CLIP 5B
    blip: float | None = None  # BLIP ViT-L


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _file:
    PUBLISHED = {
        (row.pop("task"), row.pop("metric")): Published(
            **{name: float(figure) for name, figure in row.items() if figure}
        )
        for row in csv.DictReader(_file)
    }
