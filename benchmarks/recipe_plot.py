"""The plot of `recipes`: accuracy by images seen, and by seconds of training."""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, StrMethodFormatter

Outcome = dict[str, float]
"""Of a run: top-1 by set, their mean as "mean", "seconds" and others, see benchmarks.recipes."""

_COLOURS = ("#7a7a7a", "#1f4e79", "#2e8b57", "#a65e2e", "#7b3f8c", "#b8860b", "#c2405a", "#2f9ea0")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def write_plot(path: str, points: dict[str, dict[int, list[Outcome]]], teacher: float) -> None:
    """Write a PNG: a line for each STUDENT: RECIPE, from its budgets; bars are a standard deviation over seeds."""
    rows = -(-len(points) // 3)
    figure = Figure(figsize=(10, 4.2 + 0.2 * rows), layout="constrained")
    by_images, by_seconds = figure.subplots(1, 2, sharey=True)
    students, recipes = (
        list(dict.fromkeys(parts)) for parts in zip(*(name.split(": ", 1) for name in points), strict=True)
    )
    for name, budgets in points.items():
        scores = [[100 * run["mean"] for run in runs] for runs in budgets.values()]
        means = [statistics.fmean(values) for values in scores]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in scores]
        seconds = [min(run["seconds"] for run in runs) for runs in budgets.values()]
        student, recipe = name.split(": ", 1)
        place, dashed = recipes.index(recipe), students.index(student) % 2
        look = {
            "color": _COLOURS[place % len(_COLOURS)],
            "marker": _MARKS[place % len(_MARKS)],
            "ls": ("-", "--")[dashed],
        }
        by_images.errorbar(list(budgets), means, spread, ms=5, lw=1.4, capsize=3, label=name, **look)
        by_seconds.errorbar(seconds, means, spread, ms=5, lw=1.4, capsize=3, **look)
    for axes, what in ((by_images, "images seen"), (by_seconds, "seconds of training on one thread")):
        axes.axhline(100 * teacher, color="#bbbbbb", lw=1, ls="--")
        axes.set(xlabel=what, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    by_images.xaxis.set_major_locator(FixedLocator(sorted({seen for budgets in points.values() for seen in budgets})))
    by_images.set_ylabel("zero-shot top-1, %, mean of the sets")
    by_images.annotate("teacher", (0.01, 100 * teacher), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
