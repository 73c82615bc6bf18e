"""Charts as SVG: lines, bars, histograms, points and tables of shades. Colours come from the page's style.

They are drawn here, and not by a plotting library, since a page of twenty charts then stays below 200 KB, works without
a network, and follows the reader's colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

from dimefm.pages.axis import Axis, axis, words
from dimefm.pages.page import Chart, Dot
from dimefm.system.inert_text import line as inert

_WIDTH, _HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 10, 40
_MOST_POINTS = 400  # of a line: more cannot be seen apart
_LETTER, _MOST_LETTERS = 7.8, 60


class Line(NamedTuple):
    """A line by its points, in order of x. Lines of one `colour` belong together; by default each has its own."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = None


@dataclass(frozen=True)
class _Drawing:
    """The parts of a chart in the order in which they are drawn."""

    across: Axis
    along: Axis
    parts: list[Markup] = field(default_factory=list)
    height: int = _HEIGHT

    def add(self, element: str, *values: object) -> None:
        """Draw an element; each `{}` in it gets a value, escaped."""
        self.parts.append(Markup(element).format(*[round(v, 2) if isinstance(v, float) else v for v in values]))

    def text(self, x: float, y: float, shown: str, anchor: str = "middle") -> None:
        self.add('<text x="{}" y="{}" text-anchor="{}">{}</text>', float(x), float(y), anchor, inert(shown))

    def frame(self, across: str, along: str, *, ticks_across: bool = True) -> None:
        """The grid, the numbers and the names of both axes."""
        bottom = self.height - _BOTTOM
        for value in self.along.ticks:
            y = self.along.at(value)
            self.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', _LEFT, _WIDTH - _RIGHT, y, y)
            self.text(_LEFT - 6, y + 4, words(value), "end")
        self.add('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>', _LEFT, _WIDTH - _RIGHT, bottom, bottom)
        for value in self.across.ticks if ticks_across else ():
            self.text(self.across.at(value), bottom + 17, words(value))
        self.text((_LEFT + _WIDTH - _RIGHT) / 2, self.height - 5, _short(across, _MOST_LETTERS))
        if along:
            self.add(
                '<text x="12" y="{}" text-anchor="middle" transform="rotate(-90 12 {})">{}</text>',
                (bottom + _TOP) / 2, (bottom + _TOP) / 2, inert(_short(along, _MOST_LETTERS // 2)),
            )  # fmt: skip

    def svg(self, across: str = "") -> Markup:
        head = Markup('<svg viewBox="0 0 {} {}" data-x="{}" data-y="{}" data-across="{}">')
        opened = head.format(_WIDTH, self.height, self.across.scale, self.along.scale, inert(across))
        return opened + Markup("").join(self.parts) + Markup("</svg>")


def line_chart(
    title: str, lines: Sequence[Line], across: str, along: str, *, log: bool = False, zero: bool = False,
    log_across: bool = False, rules: Sequence[tuple[str, float]] = (), note: str = "",
) -> Chart:  # fmt: skip
    """Lines over a common axis. `rules` are horizontal lines with names; `log` and `zero` are for the vertical axis.
    Points that are not finite are left out."""
    kept = [one._replace(points=[p for p in one.points if all(map(math.isfinite, p))]) for one in lines]
    kept = [one for one in kept if one.points]
    heights = [y for one in kept for _, y in one.points] + [value for _, value in rules]
    drawing = _Drawing(
        axis([x for one in kept for x, _ in one.points], _LEFT, _WIDTH - _RIGHT, log=log_across),
        axis(heights, _HEIGHT - _BOTTOM, _TOP, log=log, zero=zero),
    )
    drawing.frame(across, along)
    drawing.add('<line class="cursor" y1="{}" y2="{}" visibility="hidden"/>', _TOP, _HEIGHT - _BOTTOM)
    legend: dict[str, int] = {}
    for number, one in enumerate(kept):
        colour = number if one.colour is None else one.colour
        legend.setdefault(one.name, colour)
        places = [(drawing.across.at(x), drawing.along.at(y)) for x, y in _thinned(one.points)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawing.add('<polyline class="s{}" data-name="{}" points="{}"/>', colour % 8, inert(one.name), joined)
        if len(places) <= 30:
            for x, y in places:
                drawing.add('<circle class="f{}" cx="{}" cy="{}" r="2.6"/>', colour % 8, x, y)
    for number, (name, value) in enumerate(rules, max(legend.values(), default=-1) + 1):
        y = drawing.along.at(value)
        drawing.add(
            '<line class="rule s{}" x1="{}" x2="{}" y1="{}" y2="{}"/>', number % 8, _LEFT, _WIDTH - _RIGHT, y, y
        )
        legend[f"{name}: {value:.4g}"] = number
    ends = [f"{one.name} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in kept]
    alt = f"{along} over {across}; " + ("; ".join(ends) or "nothing yet")
    return Chart(title, drawing.svg(across), alt, [(colour, name) for name, colour in legend.items()], note)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS: of each part of a longer line its lowest and its highest point, so that peaks stay."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    parts = _MOST_POINTS // 2
    cuts = [len(points) * n // parts for n in range(parts + 1)]
    found = []
    for start, stop in pairwise(cuts):
        part = points[start:stop]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[tuple[str, Sequence[int]]], across: str, along: str = "rows",
    *, log_across: bool = False, note: str = "",
) -> Chart:  # fmt: skip
    """Counts between edges, those of several names on top of each other. With `log_across` all bins are equally wide,
    whatever their edges."""
    bins = len(edges) - 1
    totals = [sum(values[n] for _, values in counts) for n in range(bins)]
    x = axis([0, bins], _LEFT, _WIDTH - _RIGHT) if log_across else _tight(edges)
    drawing = _Drawing(x, axis(totals, _HEIGHT - _BOTTOM, _TOP, zero=True))
    drawing.frame(across, along, ticks_across=not log_across)
    places = [
        _LEFT + (_WIDTH - _RIGHT - _LEFT) * n / bins if log_across else x.at(edge) for n, edge in enumerate(edges)
    ]
    if log_across:
        step = -(-len(edges) // 8)
        for n in range(0, len(edges), step):
            drawing.text(places[n], _HEIGHT - _BOTTOM + 17, words(edges[n]))
    for n in range(bins):
        below = 0
        for colour, (name, values) in enumerate(counts):
            low, high = drawing.along.at(below), drawing.along.at(below + values[n])
            below += values[n]
            if values[n]:
                drawing.add(
                    '<rect class="f{}" x="{}" y="{}" width="{}" height="{}"><title>{} to {}: {}{:,}</title></rect>',
                    colour % 8, places[n] + 0.5, high, max(0.8, places[n + 1] - places[n] - 1), max(low - high, 0.8),
                    words(edges[n]), words(edges[n + 1]), inert(f"{name} " if len(counts) > 1 else ""), values[n],
                )  # fmt: skip
    peak = max(range(bins), key=totals.__getitem__)
    alt = f"{sum(totals):,} {along} by {across} from {edges[0]:.4g} to {edges[-1]:.4g}"
    alt += f", most between {edges[peak]:.4g} and {edges[peak + 1]:.4g}"
    legend = [(n, name) for n, (name, _) in enumerate(counts)] if len(counts) > 1 else []
    return Chart(title, drawing.svg(across), alt, legend, note)


def _tight(edges: Sequence[float]) -> Axis:
    """An axis that ends with the outermost edges."""
    round_one = axis(edges, _LEFT, _WIDTH - _RIGHT)
    inside = tuple(tick for tick in round_one.ticks if edges[0] <= tick <= edges[-1])
    return Axis(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT, inside)


class Bar(NamedTuple):
    """A bar: its height, its 95% interval if there is one, and what is written at its end."""

    value: float
    words: str
    interval: tuple[float, float] | None = None


def bar_chart(
    title: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[Bar | None]]], along: str, *, note: str = ""
) -> Chart:
    """Horizontal bars: for each group one of each series, which have names for the legend. None: there is no bar."""
    thick, gap = (14, 10) if len(series) > 1 else (18, 8)
    high = _TOP + len(groups) * (thick * len(series) + gap) + _BOTTOM
    tops = [
        v for _, bars in series for bar in bars if bar for v in (bar.value, bar.interval[1] if bar.interval else 0.0)
    ]
    left = 14 + _LETTER * max((len(_short(group)) for group in groups), default=0)
    right = 12 + _LETTER * max((len(_short(bar.words)) for _, bars in series for bar in bars if bar), default=0)
    drawing = _Drawing(axis(tops, left, _WIDTH - right, zero=True), Axis(0, 1, 0, 1, ()), height=high)
    for value in drawing.across.ticks:
        x = drawing.across.at(value)
        drawing.add('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', x, x, _TOP, high - _BOTTOM)
        drawing.text(x, high - _BOTTOM + 17, words(value))
    drawing.text((left + _WIDTH - right) / 2, high - 5, _short(along, _MOST_LETTERS))
    for g, group in enumerate(groups):
        top = _TOP + g * (thick * len(series) + gap) + gap / 2
        drawing.add("<g><title>{}</title>", inert(group))
        drawing.text(left - 6, top + thick * len(series) / 2 + 4, _short(group), "end")
        drawing.add("</g>")
        for s, (_, bars) in enumerate(series):
            if (bar := bars[g]) is None:
                continue
            y, end = top + s * thick, drawing.across.at(bar.value)
            drawing.add(
                '<rect class="f{}" x="{}" y="{}" width="{}" height="{}"/>', s % 8, left, y, end - left, thick - 2
            )
            after = end
            if bar.interval:
                low, after = map(drawing.across.at, bar.interval)
                middle = y + thick / 2 - 1
                drawing.add(
                    '<line class="whisker" x1="{}" x2="{}" y1="{}" y2="{}"/>', low, max(after, end), middle, middle
                )
            drawing.text(max(after, end) + 4, y + thick / 2 + 3, _short(bar.words), "start")
    said = [
        f"{group}: " + ", ".join(f"{name} {bars[g].words}" for name, bars in series if bars[g])  # type: ignore[union-attr]
        for g, group in enumerate(groups)
    ]
    legend = [(n, name) for n, (name, _) in enumerate(series)] if len(series) > 1 else []
    return Chart(title, drawing.svg(), f"{along}; " + "; ".join(said), legend, note)


def _short(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def point_map(title: str, dots: Sequence[Dot], groups: Sequence[str] = (), *, note: str = "") -> Chart:
    """Points without axes, near each other where what they stand for is alike; their words and pictures are shown at
    the pointer."""
    side = 480
    across = axis([dot.x for dot in dots], 10, side - 10)
    along = axis([dot.y for dot in dots], side - 10, 10)
    parts = [
        Markup('<circle class="point f{}" cx="{:.1f}" cy="{:.1f}" r="3.6"/>').format(
            dot.group % 8, across.at(dot.x), along.at(dot.y)
        )
        for dot in dots
    ]
    svg = Markup('<svg viewBox="0 0 {} {}">').format(side, side) + Markup("").join(parts) + Markup("</svg>")
    used = sorted({dot.group for dot in dots})
    legend = [(group, groups[group]) for group in used] if groups else []
    return Chart(title, svg, f"{len(dots):,} points; the arrow keys go through them", legend, note, dots=dots)


def scatter_chart(
    title: str, points: Sequence[tuple[str, float, float]], across: str, along: str, *, log_across: bool = False,
    joined: bool = False, note: str = "",
) -> Chart:  # fmt: skip
    """Points with names, each in its own colour; `joined`: by a line in their order."""
    drawing = _Drawing(
        axis([x for _, x, _ in points], _LEFT, _WIDTH - _RIGHT, log=log_across),
        axis([y for _, _, y in points], _HEIGHT - _BOTTOM, _TOP),
    )
    drawing.frame(across, along)
    places = [(drawing.across.at(x), drawing.along.at(y)) for _, x, y in points]
    if joined:
        drawing.add('<polyline class="s7" points="{}"/>', " ".join(f"{x:.1f},{y:.1f}" for x, y in places))
    for number, ((name, x, y), (left, top)) in enumerate(zip(points, places, strict=True)):
        drawing.add(
            '<circle class="f{}" cx="{}" cy="{}" r="5"><title>{}: {} {:.4g}, {} {:.4g}</title></circle>',
            number % 8, left, top, inert(name), inert(across), x, inert(along), y,
        )  # fmt: skip
    said = "; ".join(f"{name}: {x:.4g}, {y:.4g}" for name, x, y in points)
    return Chart(
        title, drawing.svg(across), f"{along} over {across}; {said}", [(n, p[0]) for n, p in enumerate(points)], note
    )


def shade_chart(title: str, rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float]],
                across: str, along: str, *, note: str = "") -> Chart:  # fmt: skip
    """A table of shades: `shares` [row][column] lie in [0, 1]."""
    left, top, size = 150, 96, min(34.0, (_WIDTH - 160) / max(1, len(columns)))
    height = int(top + size * len(rows) + 24)
    drawing = _Drawing(Axis(0, 1, 0, 1, ()), Axis(0, 1, 0, 1, ()), height=height)
    for c, name in enumerate(columns):
        x = left + size * (c + 0.5)
        drawing.add(
            '<text x="{}" y="{}" transform="rotate(-50 {} {})">{}</text>', x, top - 6, x, top - 6, _short(inert(name))
        )
    for r, name in enumerate(rows):
        drawing.text(left - 6, top + size * (r + 0.5) + 4, _short(name), "end")
        for c, share in enumerate(shares[r]):
            drawing.add(
                '<rect class="f0" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}">'
                "<title>{} as {}: {:.1%}</title></rect>",
                left + size * c, top + size * r, size - 1, size - 1, 0.04 + 0.96 * min(1.0, share), inert(name),
                inert(columns[c]), share,
            )  # fmt: skip
    drawing.text(left + size * len(columns) / 2, height - 6, _short(f"{along} (rows) {across}", _MOST_LETTERS))
    most = sorted(
        (
            (shares[r][c], rows[r], columns[c])
            for r in range(len(rows))
            for c in range(len(columns))
            if rows[r] != columns[c]
        ),
        reverse=True,
    )[:3]
    alt = f"{along} by {across}; most: " + ", ".join(f"{row} as {column} {share:.0%}" for share, row, column in most)
    return Chart(title, drawing.svg(), alt, note=note)
