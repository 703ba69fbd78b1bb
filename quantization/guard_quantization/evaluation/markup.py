"""Pieces of a page: tables, plots and numbers as HTML.

Everything in it is a number or an escaped name; plots are images within the file, so that nothing
on the page can run and nothing is fetched.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_TITLES = {
    **{"f1": "F1", "fpr": "FPR", "auroc": "AUROC", "auprc": "AUPRC", "ece": "ECE", "kl": "KL"},
    **{"p_unsafe_difference": "mean |Δ P(unsafe)|", "verdict_agreement": "same verdict"},
    **{"mlp": "MLPs", "brier": "Brier"},
}
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
 padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
table {{ border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .5rem; text-align: right; border-bottom: 1px solid #e6e6e6;
 vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th {{ font-weight: 600; }} small {{ color: #666; }}
td small {{ display: block; white-space: nowrap; line-height: 1.1; padding-bottom: .2rem; }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }}
figure {{ margin: 0; flex: 0 1 24rem; }} img {{ width: 100%; }}
figcaption {{ color: #555; font-size: 13px; }}
.wide {{ overflow-x: auto; }} .bad {{ color: #b2182b; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


def page(heading: str, parts: Iterable[str]) -> str:
    """The whole page; `parts` are HTML, the heading is text."""
    return "\n".join([_HEAD.format(title=escape(heading)), *parts, "</body>", "</html>", ""])


def write_page(path: Path, text: str) -> None:
    """Write a page, over an older one: it is a view of what is recorded elsewhere."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Cell(str):
    """A cell that is HTML already."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a cell is text unless it is a Cell. Nothing without rows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{_inner(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not lines:
        return ""
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _inner(cell: str) -> str:
    return cell if isinstance(cell, Cell) else escape(cell)


def shown(plots: Iterable[tuple[str, str]]) -> str:
    """Plots, each a caption and an SVG, side by side. Nothing without any."""
    figures = []
    for name, svg in plots:
        data = base64.b64encode(svg.encode()).decode()
        source, text = f"data:image/svg+xml;base64,{data}", escape(name)
        figures.append(
            f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
        )
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def title(name: str) -> str:
    """How a figure or a step is called."""
    return _TITLES.get(name, name.replace("_", " "))


def number(value: float | None, form: str = ".3f") -> str:
    """Nothing for a figure that is not defined."""
    return "" if value is None else f"{value:{form}}"


def whole(value: float | None) -> str:
    """A count, or a size in MiB."""
    return number(value, ",.0f")


def cell(figures: Mapping[str, Any], name: str) -> str:
    """A figure with its interval below."""
    return Cell(f"{number(figures[name])}<small>{interval(figures, name)}</small>")


def interval(figures: Mapping[str, Any], name: str) -> str:
    """The interval of a figure."""
    return ends(figures["intervals"].get(name) or (None, None))


def ends(pair: Sequence[float | None], form: str = ".3f") -> str:
    """An interval; nothing where there is none."""
    low, high = pair
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
