"""An evaluation report for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_service.terminal import printable

_COLUMNS = ("f1", "precision", "recall", "fpr", "auroc", "auprc", "ece", "brier")
_BY_GROUP = ("f1", "recall", "fpr", "auroc", "ece")  # what 80 columns hold; --json has all
_TITLES = {"fpr": "FPR", "auroc": "AUROC", "auprc": "AUPRC", "ece": "ECE"}
_MOST = 40


def show_report(report: Mapping[str, Any]) -> None:
    """The figures of all rows with their intervals, then those of the groups."""
    to = Console(highlight=False, markup=False)
    for judge in report["judges"]:
        to.print(printable(f"model {judge['model']} {judge['model_digest']}, {judge['policy']}"))
    rows, unjudged = report["data"]["rows"], report["unjudged"]
    to.print(f"{rows} rows, {unjudged['rows']} without verdict; unsafe is: {report['verdict']}")
    for reason, count in unjudged["by_reason"].items():
        to.print(printable(f"  ! {count} not judged: {reason}"))
    if report["incomplete"]:
        to.print(f"  ! of {report['incomplete']} rows a part was not judged")
    to.print(_whole(report["all"]))
    for name, groups in report["by"].items():
        if groups:
            to.print(_groups(name, groups))
    if report["by_category"]:
        to.print(_categories(report))
        naming = report["categories"]
        to.print(
            f"category named first: right in {_ranged(naming, 'accuracy')} of {naming['rows']} "
            f"rows, macro F1 {_ranged(naming, 'macro_f1')}"
        )
    refusal = report["over_refusal"]
    to.print(
        f"over-refusal: {_ranged(refusal, 'fpr')} of {refusal['rows']} harmless rows that sound "
        f"dangerous ({printable(', '.join(refusal['patterns']))})"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=printable(title), box=box.SIMPLE, title_justify="left")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, min_width=5)
    return table


def _whole(figures: Mapping[str, Any]) -> Table:
    table = _table("All rows", "", "95 %")
    table.add_row("safe", str(figures["safe"]), "")
    table.add_row("unsafe", str(figures["unsafe"]), "")
    for name in _COLUMNS:
        table.add_row(_TITLES.get(name, name), _number(figures[name]), _range(figures, name))
    return table


def _groups(name: str, groups: Mapping[str, Any]) -> Table:
    table = _table(f"By {name}", "safe", "unsafe", *(_TITLES.get(one, one) for one in _BY_GROUP))
    for group, figures in list(groups.items())[:_MOST]:
        cells = (_number(figures[one]) for one in _BY_GROUP)
        table.add_row(printable(group), str(figures["safe"]), str(figures["unsafe"]), *cells)
    if len(groups) > _MOST:
        table.add_row(f"and {len(groups) - _MOST} more: see --json")
    return table


def _categories(report: Mapping[str, Any]) -> Table:
    table = _table("By category", "rows", "recall", "95 %", "AUROC", "named F1")
    for code, one in report["by_category"].items():
        cells = (_number(one["recall"]), _range(one, "recall"), _number(one["auroc"]))
        table.add_row(printable(code), str(one["rows"]), *cells, _number(one.get("named_f1")))
    return table


def _ranged(figures: Mapping[str, Any], name: str) -> str:
    return f"{_number(figures[name])} {_range(figures, name)}".rstrip()


def _range(figures: Mapping[str, Any], name: str) -> str:
    low, high = figures["intervals"][name]
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
