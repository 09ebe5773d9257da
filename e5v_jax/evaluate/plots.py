"""Pictures of an embedding space: one PNG per projection, one panel per model and prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e5v_jax.evaluate.space import project, tsne

_TEXT, _IMAGE = "#D55E00", "#0072B2"  # told apart by colour-blind readers, too


class Panel(NamedTuple):
    """This is what one panel shows; all vectors have length 1."""

    title: str
    texts: np.ndarray  # [C, D]
    images: np.ndarray  # [N, D]


class Projection(NamedTuple):
    """This is a way to draw vectors in the plane."""

    file: str
    title: str
    axis: str  # what the two axes are, after 1st and 2nd; empty where they mean nothing
    place: Callable[[np.ndarray], np.ndarray]  # [N, D] -> [N, 2]


PROJECTIONS = (
    Projection(
        "svd.png", "SVD, not centred", "singular direction", partial(project, centred=False)
    ),
    Projection("pca.png", "PCA, centred", "principal component", partial(project, centred=True)),
    Projection("tsne.png", "t-SNE", "", tsne),
)


def draw_projection(projection: Projection, panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side as one PNG. Raises ImportError: no matplotlib or sklearn."""
    from matplotlib.figure import Figure

    placed = [projection.place(np.concatenate([p.texts, p.images])) for p in panels]  # [C + N, 2]
    low, high = min(points.min() for points in placed), max(points.max() for points in placed)
    limits = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel, points in zip(grid.flat, panels, placed, strict=False):
        size = float(np.clip(4000 / len(points), 4, 24))
        for kind, colour, marker, part in (
            ("texts", _TEXT, "o", points[: len(panel.texts)]),
            ("images", _IMAGE, "s", points[len(panel.texts) :]),
        ):
            style = {"c": colour, "marker": marker, "alpha": 0.6, "linewidths": 0}
            axis.scatter(*part.T, s=size, label=kind, **style)
        axis.set_title(panel.title, fontsize=10)
        axis.tick_params(labelsize=7)
        if projection.axis:  # the same scale everywhere, so that gaps can be compared by eye
            axis.set_xlabel(f"1st {projection.axis}", fontsize=8)
            axis.set_ylabel(f"2nd {projection.axis}", fontsize=8)
            axis.set(xlim=limits, ylim=limits, aspect="equal")
        else:  # t-SNE: only who is near whom means anything
            axis.set(xticks=[], yticks=[])
    figure.suptitle(projection.title, fontsize=12)
    legend = grid.flat[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    figure.savefig(path, dpi=150)
