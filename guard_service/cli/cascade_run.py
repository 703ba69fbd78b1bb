"""What `guardctl cascade` does: two files of scores in, a band and its figures out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from guard_service.cli import exits
from guard_service.evaluation.cascade import Fit, Point, fit_band
from guard_service.evaluation.figures import wilson
from guard_service.evaluation.report import digest, labels_of, write_new
from guard_service.evaluation.rows import DataError, LabelledRow, data_files, read_rows
from guard_service.evaluation.scores import Scores, read_scores
from guard_service.terminal import printable

FORMAT = "guard-cascade/1"


@dataclass(frozen=True, slots=True)
class What:
    """Which rows, what both guards said of them, and what the band may give up."""

    data: Path
    first: Path
    second: Path
    split: str
    tolerance: float


def run(what: What, out: Path | None, as_json: bool) -> int:
    """Fit and tell; the exit code."""
    try:
        report = fitted(what)
        if out:
            write_new(out, json.dumps(report, indent=1) + "\n")
    except (DataError, ValueError, FileExistsError) as wrong:
        exits.fail(str(wrong), exits.USAGE)
    except OSError as wrong:
        exits.fail(f"cannot read or write: {wrong}")
    if as_json:
        print(json.dumps(report))
    else:
        show(report)
    return exits.OK


def fitted(what: What) -> dict[str, Any]:
    """The report, as plain data. Raises DataError for files that do not belong together and
    ValueError for rows that no band can be fitted to."""
    rows = [row for row, _ in read_rows(data_files(what.data), what.split)]
    first, second = read_scores(what.first, rows), read_scores(what.second, rows)
    _check_judges(what, first, second)
    both = [at for at in first.judged() if at not in second.failures]
    kept = [rows[at] for at in both]
    first, second = first.take(both), second.take(both)
    fit = fit_band(
        labels_of(kept),
        first.unsafe,
        first.verdicts(None),
        second.verdicts(None),
        what.tolerance,
    )
    return {
        "format": FORMAT,
        "data": {"rows": len(kept), "digest": digest(kept), "not_judged": len(rows) - len(kept)},
        "judges": {
            "first": [dict(one) for one in first.judges],
            "second": [dict(one) for one in second.judges],
        },
        "tolerance": what.tolerance,
        **_told(fit, kept),
    }


def _check_judges(what: What, first: Scores, second: Scores) -> None:
    """Raise DataError unless each file is of one guard, and both guards judged by one policy."""
    for path, scores in ((what.first, first), (what.second, second)):
        if len(scores.judges) > 1:
            raise DataError(f"{path}: is of several guards; judge the rows with one alone")
    if len({judge["policy_digest"] for one in (first, second) for judge in one.judges}) > 1:
        raise DataError("the guards judged by different policies; judge the rows again by one")


def _told(fit: Fit, rows: list[LabelledRow]) -> dict[str, Any]:
    unsafe = sum(row.unsafe for row in rows)

    def told(point: Point) -> dict[str, Any]:
        figures = asdict(point)
        hits, wrong = round(point.recall * unsafe), round(point.fpr * (len(rows) - unsafe))
        figures["intervals"] = {
            "recall": wilson(hits, unsafe),
            "fpr": wilson(wrong, len(rows) - unsafe),
        }
        return figures

    return {
        "first": told(fit.first),
        "second": told(fit.second),
        "cascade": told(fit.chosen),
        "curve": [asdict(point) for point in fit.curve],
    }


def show(report: Mapping[str, Any]) -> None:
    """The guards alone and together, what other bands buy, and the piece for the policy.

    `agree` is the share of rows with the second guard's verdict.
    """
    to = Console(highlight=False, markup=False)
    data = report["data"]
    without = data["not_judged"]
    to.print(f"{data['rows']} rows" + f"; {without} more lack a verdict of a guard" * bool(without))
    for tier, judges in report["judges"].items():
        names = ", ".join(
            f"{one['model']} {one['model_digest']}, {one['policy']}" for one in judges
        )
        to.print(printable(f"{tier}: {names}"))
    to.print(_alone_and_together(report))
    to.print(_curve(report["curve"]))
    if report["cascade"]["band"] is None:
        to.print("the first guard is as good as the second on these rows: no band is needed")
        return
    to.print("for the policy; measure it on rows that it was not fitted to:")
    to.print(f"cascade:\n  band: {list(report['cascade']['band'])}")


def _alone_and_together(report: Mapping[str, Any]) -> Table:
    title = f"Alone and together, band {_band(report['cascade'])}"
    table = _table(title, "sent up", "recall", "95 %", "FPR", "95 %", "agree")
    for name in ("first", "second", "cascade"):
        point = report[name]
        table.add_row(
            name,
            f"{point['sent']:.1%}",
            f"{point['recall']:.3f}",
            _range(point, "recall"),
            f"{point['fpr']:.3f}",
            _range(point, "fpr"),
            f"{point['agreement']:.3f}",
        )
    return table


def _curve(points: list[Mapping[str, Any]]) -> Table:
    table = _table("What bands buy", "sent up", "recall", "FPR", "agree")
    for point in points:
        figures = (f"{point['recall']:.3f}", f"{point['fpr']:.3f}", f"{point['agreement']:.3f}")
        table.add_row(_band(point), f"{point['sent']:.1%}", *figures)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _band(point: Mapping[str, Any]) -> str:
    return f"{point['band'][0]:g} to {point['band'][1]:g}" if point["band"] else "none"


def _range(point: Mapping[str, Any], name: str) -> str:
    low, high = point["intervals"][name]
    return f"[{low:.3f}, {high:.3f}]"
