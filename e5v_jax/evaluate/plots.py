"""Pictures of an embedding space: one PNG per projection, one panel per model and prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e5v_jax.evaluate.space import project, tsne

_TEXT, _IMAGE = "#D55E00", "#0072B2"  # told apart by colour-blind readers, too


@dataclass(frozen=True)
class Panel:
    """This is what one panel shows."""

    title: str
    texts: np.ndarray
    """[C, D], unit length."""
    images: np.ndarray
    """[N, D], unit length."""


@dataclass(frozen=True)
class Projection:
    """This is a way to draw vectors in the plane."""

    file: str
    title: str
    axes: tuple[str, str]
    place: Callable[[np.ndarray], np.ndarray]
    """[N, D] -> [N, 2]"""


PROJECTIONS = (
    Projection(
        "svd.png",
        "SVD, not centred",
        ("1st singular direction", "2nd singular direction"),
        lambda v: project(v, centred=False),
    ),
    Projection(
        "pca.png",
        "PCA, centred",
        ("1st principal component", "2nd principal component"),
        lambda v: project(v, centred=True),
    ),
    Projection("tsne.png", "t-SNE", ("", ""), tsne),
)


def draw_projection(projection: Projection, panels: Sequence[Panel], path: Path) -> None:
    """Write one PNG: the panels side by side, texts and images placed together in each.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    placed = [projection.place(np.concatenate([p.texts, p.images])) for p in panels]  # [C + N, 2]
    low, high = min(points.min() for points in placed), max(points.max() for points in placed)
    margin = 0.05 * (high - low)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)  # no display needed
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel, points in zip(grid.flat, panels, placed, strict=False):
        size = float(np.clip(4000 / len(points), 4, 24))
        for kind, colour, marker, part in (
            ("texts", _TEXT, "o", points[: len(panel.texts)]),
            ("images", _IMAGE, "s", points[len(panel.texts) :]),
        ):
            axis.scatter(
                *part.T, s=size, c=colour, marker=marker, alpha=0.6, linewidths=0, label=kind
            )
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel(projection.axes[0], fontsize=8)
        axis.set_ylabel(projection.axes[1], fontsize=8)
        axis.tick_params(labelsize=7)
        if projection.axes[0]:  # the same scale everywhere, so that gaps can be compared by eye
            axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
            axis.set_aspect("equal")
        else:  # t-SNE: only who is near whom means anything
            axis.set(xticks=[], yticks=[])
    figure.suptitle(projection.title, fontsize=12)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, markerscale=2
    )
    figure.savefig(path, dpi=150)
