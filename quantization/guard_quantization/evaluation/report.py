"""A page for people: one HTML file with tables and plots, and no row's text on it.

Everything in it is a number or an escaped name; plots are images within the file, so that nothing
on the page can run and nothing is fetched.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from guard_quantization.evaluation import plots
from guard_service.evaluation.figures import NAMES
from guard_service.evaluation.report import jsonable, write_new

_TITLES = {"f1": "F1", "fpr": "FPR", "auroc": "AUROC", "auprc": "AUPRC", "ece": "ECE"}
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
 padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e6e6e6; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: 600; }} small {{ color: #666; }}
.plots {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }}
figure {{ margin: 0; }} figcaption {{ color: #555; }} img {{ max-width: 100%; }}
.wide {{ overflow-x: auto; }} .bad {{ color: #b2182b; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclass(frozen=True, slots=True)
class Stages:
    """What the stages of a pipeline hand in; each may be left out."""

    sizes: Mapping[str, float] = field(default_factory=dict)  # MiB after each step
    accuracy: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # by step
    losses: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)  # (step, loss)
    blocks: Sequence[float] = ()  # importance of each block, in order
    removed: Sequence[int] = ()  # the blocks taken out
    neurons: Mapping[str, Sequence[float]] = field(default_factory=dict)  # importance, by layer
    kept_neurons: int = 0


def write_report(
    folder: Path,
    title: str,
    report: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
    broken: Sequence[str] = (),
) -> Path:
    """Write report.json and report.html into a folder; the page's path. Writes over nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = folder / "report.html"
    if shown.exists():
        raise FileExistsError(f"{shown} exists; reports are never written over")
    given = {
        "evaluation": report,
        "comparison": comparison,
        "stages": asdict(stages) if stages else None,
        "broken": list(broken),
    }
    text = json.dumps(jsonable({key: value for key, value in given.items() if value}), indent=1)
    write_new(folder / "report.json", text + "\n")
    write_new(shown, page(title, report, comparison, stages, broken))
    return shown


def page(
    title: str,
    report: Mapping[str, Any] | None = None,
    comparison: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
    broken: Sequence[str] = (),
) -> str:
    """The page. `report` is of `evaluate`, `comparison` of `compare`, `broken` of the gate."""
    parts = [_HEAD.format(title=escape(title))]
    if broken:
        parts += ["<h2>Limits that are broken</h2>", '<ul class="bad">']
        parts += [f"<li>{escape(str(one))}</li>" for one in broken]
        parts.append("</ul>")
    if stages:
        parts += _stages(stages)
    if report:
        parts += _evaluation(jsonable(report))
    if comparison:
        parts += _comparison(jsonable(comparison))
    return "\n".join([*parts, "</body>", "</html>", ""])


def _evaluation(report: Mapping[str, Any]) -> Iterator[str]:
    whole, curves = report["all"], report["curves"]
    yield "<h2>How well it judges</h2>"
    judges = (
        f"{one['model']} ({one['model_digest']}), {one['policy']}" for one in report["judges"]
    )
    about = [*judges, f"unsafe is: {report['verdict']}", "intervals are 95 %"]
    yield f"<p><small>{escape('; '.join(about))}</small></p>"
    yield from _unjudged(report)
    counts = {"rows": whole["rows"], "safe": whole["safe"], "unsafe": whole["unsafe"]}
    yield _table(
        ("", "value", "95 %"),
        [
            *((name, str(count), "") for name, count in counts.items()),
            *((_title(name), _number(whole[name]), _range(whole, name)) for name in NAMES),
            ("over-refusal", *_valued(report["over_refusal"], "fpr")),
            ("first category right", *_valued(report["categories"], "accuracy")),
            ("macro F1 of categories", *_valued(report["categories"], "macro_f1")),
        ],
    )
    shown = [("Calibration; the area is the number of rows", plots.calibration, "calibration")]
    images = [(name, draw(curves[key])) for name, draw, key in shown if curves[key]]
    if curves["roc"]:
        roc = plots.curve(curves["roc"], "false positive rate", "recall", diagonal=True)
        images += [("ROC", roc)]
        images += [("Precision and recall", plots.curve(curves["pr"], "recall", "precision"))]
    yield _plots(images)
    yield from _grouped(report)


def _unjudged(report: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in report["unjudged"]["by_reason"].items():
        yield f'<p class="bad">{count} rows not judged: {escape(reason)}</p>'
    if report["incomplete"]:
        yield f'<p class="bad">Of {report["incomplete"]} rows a part was not judged.</p>'


def _grouped(report: Mapping[str, Any]) -> Iterator[str]:
    for dimension, groups in report["by"].items():
        if not groups:
            continue
        yield f"<h2>By {escape(dimension)}</h2>"
        if dimension in ("language", "file", "direction"):
            names = ("f1", "auroc", "fpr")
            images = [(_title(name), plots.bars(groups, name, _title(name))) for name in names]
            yield _plots(images)
        header = ("", "safe", "unsafe", *(_title(name) for name in NAMES))
        yield _table(
            header,
            (
                (name, str(one["safe"]), str(one["unsafe"]), *(_cell(one, key) for key in NAMES))
                for name, one in groups.items()
            ),
        )
    if report["by_category"]:
        yield "<h2>By category</h2>"
        found = report["by_category"]
        shown = (("recall", "recall"), ("auroc", "AUROC against all safe rows"))
        yield _plots([(text, plots.bars(found, name, text)) for name, text in shown])
        yield _table(
            ("", "rows", "recall", "AUROC", "F1 of being named first"),
            (
                (code, str(one["rows"]), *(_cell(one, key) for key in ("recall", "auroc")))
                + (_number(one.get("named_f1")),)
                for code, one in found.items()
            ),
        )


def _comparison(found: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Against the reference</h2>"
    verdicts, moved = found["verdicts"], found["unsafe_score"]
    yield (
        f"<p>{found['judged_by_both']} rows judged by both; verdicts agree on "
        f"{_number(verdicts['agreement'])} ({verdicts['to_unsafe']} became unsafe, "
        f"{verdicts['to_safe']} safe). P(unsafe) differs by {_number(moved['mean'])} in the mean, "
        f"{_number(moved['max'])} at most.</p>"
    )
    yield _table(("", *_PAIR), _pairs({_title(k): v for k, v in found["figures"].items()}))
    for dimension in ("language", "direction"):
        for figure in ("f1", "auroc"):
            groups = {name: one["figures"][figure] for name, one in found["by"][dimension].items()}
            yield _table((f"{_title(figure)} by {dimension}", *_PAIR), _pairs(groups))
    yield "<h3>Rows that moved most</h3>"
    yield _table(
        ("row", "label", "reference", "other"),
        (
            (
                f"{one['file']} {one['id']}",
                one["label"],
                _number(one["reference"]),
                _number(one["other"]),
            )
            for one in found["worst"]
        ),
    )


_PAIR = ("reference", "other", "difference", "95 %")


def _pairs(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, one in figures.items():
        signed = "" if one["difference"] is None else f"{one['difference']:+.4f}"
        cells = (_number(one["reference"]), _number(one["other"]), signed)
        yield (name, *cells, _ends(one["interval"], "+.4f"))


def _stages(stages: Stages) -> Iterator[str]:
    yield "<h2>How it was made</h2>"
    if stages.accuracy:
        names = list(dict.fromkeys(name for one in stages.accuracy.values() for name in one))
        yield _table(
            ("step", *map(_title, names)),
            (
                (step, *(_number(jsonable(one.get(name))) for name in names))
                for step, one in stages.accuracy.items()
            ),
        )
    images = []
    if stages.sizes:
        images.append(("Size after each step", plots.sizes(stages.sizes)))
    if stages.losses:
        images.append(("Loss", plots.losses(stages.losses)))
    if stages.blocks:
        images.append(("Blocks", plots.blocks(stages.blocks, stages.removed)))
    if stages.neurons:
        images.append(
            ("Neurons, layer by layer", plots.neurons(stages.neurons, stages.kept_neurons))
        )
    yield _plots(images)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _plots(images: Iterable[tuple[str, str]]) -> str:
    shown = []
    for name, svg in images:
        data = base64.b64encode(svg.encode()).decode()
        source = f"data:image/svg+xml;base64,{data}"
        text = escape(name)
        shown.append(
            f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
        )
    return '<div class="plots">\n' + "\n".join(shown) + "\n</div>"


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _valued(figures: Mapping[str, Any], name: str) -> tuple[str, str]:
    return _number(figures[name]), _range(figures, name)


def _cell(figures: Mapping[str, Any], name: str) -> str:
    return f"{_number(figures[name])} {_range(figures, name)}".rstrip()


def _range(figures: Mapping[str, Any], name: str) -> str:
    return _ends(figures["intervals"].get(name) or (None, None))


def _ends(ends: Sequence[float | None], form: str = ".3f") -> str:
    low, high = ends
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
