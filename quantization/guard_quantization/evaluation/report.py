"""How well a guard judges, as parts of a page for people; no row's text is on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from guard_quantization.evaluation import plots
from guard_quantization.evaluation.markup import (
    cell,
    ends,
    interval,
    number,
    shown,
    table,
    title,
)
from guard_service.evaluation.figures import NAMES

_BESIDE = (
    ("over-refusal", "over_refusal", "fpr"),
    ("first category right", "categories", "accuracy"),
    ("macro F1 of categories", "categories", "macro_f1"),
)


def broken_limits(broken: Sequence[object]) -> Iterator[str]:
    """What the gate found; nothing when every limit holds."""
    if broken:
        yield "<h2>Limits that are broken</h2>"
        yield '<ul class="bad">'
        yield from (f"<li>{escape(str(one))}</li>" for one in broken)
        yield "</ul>"


def evaluation(report: Mapping[str, Any]) -> Iterator[str]:
    """What `evaluate` found."""
    whole, curves = report["all"], report["curves"]
    yield "<h2>How well it judges</h2>"
    judges = (f"{one['model']} ({one['model_digest']})" for one in report["judges"])
    about = [*judges, f"unsafe is: {report['verdict']}", "intervals are 95 %"]
    yield f"<p><small>{escape('; '.join(about))}</small></p>"
    yield from _unjudged(report)
    counts = {"rows": whole["rows"], "safe": whole["safe"], "unsafe": whole["unsafe"]}
    yield table(
        ("", "value", "95 %"),
        [
            *((name, str(count), "") for name, count in counts.items()),
            *((title(name), number(whole[name]), interval(whole, name)) for name in NAMES),
            *(
                (name, number(report[of][key]), interval(report[of], key))
                for name, of, key in _BESIDE
            ),
        ],
    )
    drawn = [("Calibration; the area is the number of rows", plots.calibration, "calibration")]
    images = [(name, draw(curves[key])) for name, draw, key in drawn if curves[key]]
    if curves["roc"]:
        roc = plots.curve(curves["roc"], "false positive rate", "recall", diagonal=True)
        images += [("ROC", roc)]
        images += [("Precision and recall", plots.curve(curves["pr"], "recall", "precision"))]
    yield shown(images)
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
            images = [(title(name), plots.bars(groups, name, title(name))) for name in names]
            yield shown(images)
        header = ("", "safe", "unsafe", *(title(name) for name in NAMES))
        yield table(
            header,
            (
                (name, str(one["safe"]), str(one["unsafe"]), *(cell(one, key) for key in NAMES))
                for name, one in groups.items()
            ),
        )
    if report["by_category"]:
        yield "<h2>By category</h2>"
        found = report["by_category"]
        drawn = (("recall", "recall"), ("auroc", "AUROC against all safe rows"))
        yield shown([(text, plots.bars(found, name, text)) for name, text in drawn])
        yield table(
            ("", "rows", "recall", "AUROC", "F1 of being named first"),
            (
                (code, str(one["rows"]), *(cell(one, key) for key in ("recall", "auroc")))
                + (number(one.get("named_f1")),)
                for code, one in found.items()
            ),
        )


def comparison(found: Mapping[str, Any]) -> Iterator[str]:
    """What `compare` found."""
    yield "<h2>Against the reference</h2>"
    verdicts, moved = found["verdicts"], found["unsafe_score"]
    yield (
        f"<p>{found['judged_by_both']} rows judged by both; verdicts agree on "
        f"{number(verdicts['agreement'])} ({verdicts['to_unsafe']} became unsafe, "
        f"{verdicts['to_safe']} safe). P(unsafe) differs by {number(moved['mean'])} in the mean, "
        f"{number(moved['max'])} at most.</p>"
    )
    yield table(("", *_PAIR), _pairs({title(k): v for k, v in found["figures"].items()}))
    for dimension in ("language", "direction"):
        for figure in ("f1", "auroc"):
            groups = {name: one["figures"][figure] for name, one in found["by"][dimension].items()}
            yield table((f"{title(figure)} by {dimension}", *_PAIR), _pairs(groups))
    yield "<h3>Rows that moved most</h3>"
    yield table(
        ("row", "label", "reference", "other"),
        (
            (
                f"{one['file']} {one['id']}",
                one["label"],
                number(one["reference"]),
                number(one["other"]),
            )
            for one in found["worst"]
        ),
    )


_PAIR = ("reference", "other", "difference", "95 %")


def _pairs(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, one in figures.items():
        signed = "" if one["difference"] is None else f"{one['difference']:+.4f}"
        cells = (number(one["reference"]), number(one["other"]), signed)
        yield (name, *cells, ends(one["interval"], "+.4f"))


def fitted(found: Mapping[str, Any]) -> Iterator[str]:
    """What `fit_languages` found."""
    aim = found["aim"]["fpr"]
    aimed = "the best F1" if aim is None else f"a false positive rate of at most {aim:g}"
    yield "<h2>Thresholds and temperatures by language</h2>"
    yield (
        f"<p>Fitted to {escape(aimed)}; a language needs {found['aim']['least_rows']} rows of a "
        "class to have its own. A temperature of 1 is a calibrated guard, one above 1 an "
        "overconfident one.</p>"
    )
    yield table(
        ("", "safe", "unsafe", *map(title, _OF_FIT)),
        (
            (
                f"{one['direction']} {one['language'] or '(all)'}",
                *(str(one[name]) for name in ("safe", "unsafe")),
                *(number(one[name]) for name in _OF_FIT),
            )
            for one in found["fits"]
        ),
    )
    yield f"<h3>With them, on {escape(found['measured_on'])}</h3>"
    before, after = found["as_it_is"], found["with_fits"]
    yield table(
        ("", "as it is", "with them"),
        (
            ("rows", *(str(one["rows"]) for one in (before, after))),
            *((title(name), cell(before, name), cell(after, name)) for name in NAMES),
        ),
    )


_OF_FIT = ("threshold", "temperature", "f1", "recall", "fpr")
