"""Plots as SVG texts. No title or label is read as markup or mathematics."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, RED, GREY = "#2166ac", "#b2182b", "#8a8a8a"
_STYLE: Any = {
    "svg.hashsalt": "guard",  # the same figures give the same bytes
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "font.size": 9,
}
_LONGEST_LABEL = 40


def _svg(draw: Callable[[Axes], None], size: tuple[float, float] = (4.6, 3.2)) -> str:
    """The SVG of one plot; `size` in inches. Needs no display and touches no global figure."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def label(text: object) -> str:
    """What a plot shows of a name: ASCII, since fonts lack the rest, and not too long."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in str(text))
    return plain if len(plain) <= _LONGEST_LABEL else plain[: _LONGEST_LABEL - 3] + "..."


def calibration(bins: Sequence[Mapping[str, Any]]) -> str:
    """Share of unsafe rows over P(unsafe), by bin, with intervals; the area is the row count."""

    def draw(axes: Axes) -> None:
        x = np.array([one["score"] for one in bins])
        y = np.array([one["unsafe"] for one in bins])
        low, high = np.array([one["interval"] for one in bins]).reshape(-1, 2).T
        rows = np.array([one["rows"] for one in bins], float)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.errorbar(x, y, yerr=_reach(y, low, high), fmt="none", ecolor=BLUE, elinewidth=1)
        axes.scatter(x, y, s=10 + 90 * rows / max(1.0, rows.max(initial=1)), color=BLUE)
        axes.set(xlabel="P(unsafe), mean of the bin", ylabel="share unsafe")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03))  # whole dots at the ends

    return _svg(draw)


def curve(points: Sequence[Sequence[float]], x: str, y: str, diagonal: bool = False) -> str:
    """A curve in the unit square."""

    def draw(axes: Axes) -> None:
        xs, ys = np.array(points, float).reshape(-1, 2).T
        if diagonal:
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.plot(xs, ys, color=BLUE)
        axes.set(xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1.01))

    return _svg(draw)


def bars(groups: Mapping[str, Mapping[str, Any]], figure: str, title: str) -> str:
    """One figure of each group in which it is defined, with its interval where there is one."""
    shown = [(name, one) for name, one in groups.items() if one.get(figure) is not None]

    def draw(axes: Axes) -> None:
        at = np.arange(len(shown))
        values = np.array([one[figure] for _, one in shown], float)
        ends = [one.get("intervals", {}).get(figure) or (None, None) for _, one in shown]
        low, high = np.array(ends, float).reshape(-1, 2).T  # None becomes NaN
        known = np.isfinite(low) & np.isfinite(high)
        axes.barh(at, values, color=BLUE, alpha=0.75, height=0.7)
        axes.errorbar(
            values[known],
            at[known],
            xerr=_reach(values[known], low[known], high[known]),
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
        axes.set_yticks(at, [f"{label(name)} ({one['rows']})" for name, one in shown])
        axes.set(xlabel=label(title), xlim=(0, 1))
        axes.invert_yaxis()

    return _svg(draw, (5.2, 1.0 + 0.24 * max(2, len(shown))))


def _reach(values: Any, low: Any, high: Any) -> Any:
    """Error bars as matplotlib wants them; an interval may lie beside a biased value."""
    return np.maximum(0.0, np.stack([values - low, high - values]))


def losses(runs: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Loss over steps, of each run [(step, loss)]."""

    def draw(axes: Axes) -> None:
        for name, points in runs.items():
            xs, ys = np.array(points, float).reshape(-1, 2).T
            axes.plot(xs, ys, label=label(name), linewidth=1)
        axes.set(xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if runs:
            axes.legend(frameon=False)

    return _svg(draw)


def blocks(importance: Sequence[float], removed: Sequence[int] = ()) -> str:
    """Importance of each block, in order; those taken out in red."""

    def draw(axes: Axes) -> None:
        at = np.arange(len(importance))
        colours = [RED if number in removed else BLUE for number in at]
        axes.bar(at, np.array(importance, float), color=colours)
        axes.set(xlabel="block (red: taken out)", ylabel="importance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg(draw)


def neurons(layers: Sequence[Sequence[float]], kept: float = 1.0) -> str:
    """Importance of a layer's neurons, the greatest first, as a share of it: a line per layer.

    `layers` are percentiles 0 to 100; `kept` is the share of neurons that stay.
    """

    def draw(axes: Axes) -> None:
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(layers))))
        for colour, values in zip(colours, layers, strict=True):
            ranked = np.array(values, float)[::-1]
            shares = ranked / max(float(ranked.max(initial=0)), 1e-30)
            axes.plot(np.linspace(0, 100, len(ranked)), shares, color=colour, linewidth=1)
        if kept < 1:
            axes.axvline(100 * kept, color=RED, linestyle="--", linewidth=1)
        axes.set(xlabel="% of the neurons (dashed: kept to here)", ylabel="share of the greatest")
        axes.set(xlim=(0, 100), ylim=(0, 1.02))

    return _svg(draw)


def by_layer(lines: Mapping[str, Sequence[float]]) -> str:
    """A figure of each layer, by name."""

    def draw(axes: Axes) -> None:
        for name, values in lines.items():
            axes.plot(np.array(values, float), label=label(name), marker="o", markersize=3)
        axes.set(xlabel="layer", ylabel="relative error")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)

    return _svg(draw)


def sizes(steps: Mapping[str, float]) -> str:
    """Size in MiB after each step."""

    def draw(axes: Axes) -> None:
        at = np.arange(len(steps))
        drawn = axes.barh(at, np.array(list(steps.values()), float), color=BLUE, alpha=0.75)
        axes.bar_label(drawn, fmt="{:,.4g}", padding=3)
        axes.set_yticks(at, [label(name) for name in steps])
        axes.set_xlabel("MiB")
        axes.margins(x=0.12)
        axes.invert_yaxis()

    return _svg(draw, (5.2, 1.0 + 0.3 * max(2, len(steps))))
