"""The plot of accuracy against milliseconds per image, a point for each model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dimefm.system import storage

if TYPE_CHECKING:
    from dimefm.evaluation.speed import Point, Points

COLOURS = ("#1f4e79", "#2e8b57", "#a65e2e")
"""Of the students, in all plots."""
_WIDE = 5.0  # from the quickest to the slowest, beyond which the axis is logarithmic
_LEAST_POINTS = 5.0  # of accuracy that the axis shows: less would make noise look like a difference
_PLACES = (((8, 0), "left", "center"), ((-8, 0), "right", "center"), ((0, 8), "center", "bottom"),
           ((0, -8), "center", "top"), ((8, 14), "left", "center"), ((8, -14), "left", "center"))  # fmt: skip
"""Where a label may stand beside its point, in points of type, and how it is aligned there."""


def write_plot(path: str, plot: Points) -> None:
    """Write a PNG."""
    figure = Figure(figsize=(6.5, 4.2))
    figure.subplots_adjust(left=0.12, right=0.97, top=0.92, bottom=0.12)
    draw(figure.subplots(), plot)
    with storage.writing_to(path), storage.writing_atomically(path) as file:
        figure.savefig(file, dpi=130, format="png")


def draw(axes: Axes, plot: Points, colours: Sequence[str] = COLOURS) -> None:
    """Draw it into a part of a figure, with a colour for each point."""
    points = plot.points
    for number, one in enumerate(points):
        axes.scatter(one.ms, 100 * one.accuracy, s=45, color=colours[number % len(colours)], zorder=3)
    low, high = min(one.ms for one in points), max(one.ms for one in points)
    axes.set(title="Accuracy against latency", xlabel=plot.across, ylabel=plot.along)
    if high > _WIDE * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 2, high * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, high * 1.25)
    worst, best = (100 * of(one.accuracy for one in points) for of in (min, max))
    middle, half = fmean((worst, best)), 0.65 * max(_LEAST_POINTS, best - worst)
    axes.set_ylim(middle - half, middle + half)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, points)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """The name of each model beside its point, where it covers neither another name nor another point."""
    axes.get_ylim()  # chooses the limits
    whole, taken = axes.get_window_extent(), list[Any]()
    marks = [axes.transData.transform((one.ms, 100 * one.accuracy)) for one in points]
    for one in points:
        best: tuple[float, Any] | None = None
        for offset, across, along in _PLACES:
            text: Any = axes.annotate(
                one.name, (one.ms, 100 * one.accuracy), offset, textcoords="offset points", ha=across, va=along,
                fontsize=8,
            )  # fmt: skip
            box = text.get_window_extent()
            faults = sum(box.overlaps(other) for other in taken) + sum(box.contains(*mark) for mark in marks)
            faults += not (whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1))
            if best is None or faults < best[0]:
                if best is not None:
                    best[1].remove()
                best = (faults, text)
            else:
                text.remove()
        assert best is not None
        taken.append(best[1].get_window_extent())
