"""Learning curves of several seeds, drawn into one picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def picture(path: Path, **options: Any) -> Iterator[Any]:
    """Draws a figure that is written at the end.

    Args:
        path: Of the PNG.
        **options: Passed to ``pyplot.subplots``.

    Yields:
        What to draw on, as ``pyplot.subplots`` gives it.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def band(axes: Any, x: Tensor, scores: Tensor, name: str) -> None:
    """Draws the mean over seeds, in a band from the lowest to the highest.

    Args:
        axes: What is drawn on.
        x: (points,), such as episodes.
        scores: (seed, points).
        name: In the legend.
    """
    (line,) = axes.plot(x, scores.mean(0), label=name)
    axes.fill_between(x, scores.amin(0), scores.amax(0), alpha=0.15, color=line.get_color())
