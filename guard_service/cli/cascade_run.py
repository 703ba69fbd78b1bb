"""What `guardctl cascade` does: two files of scores in, a band and its figures out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from guard_policies.assessment import Direction
from guard_service.cli import exits
from guard_service.evaluation.cascade import Fit, Point, fit_band, sent
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
    fit = _fit(kept, first, second, what.tolerance)
    fits = _by_direction(kept, first, second, what.tolerance)
    return {
        "format": FORMAT,
        "data": {"rows": len(kept), "digest": digest(kept), "not_judged": len(rows) - len(kept)},
        "judges": {
            "first": [dict(one) for one in first.judges],
            "second": [dict(one) for one in second.judges],
        },
        "tolerance": what.tolerance,
        **_told(fit, kept),
        "directions": {
            way.value: _told(one, [row for row in kept if row.direction is way])
            for way, one in fits.items()
        },
        "languages": _by_language(kept, first, second, fits),
    }


def _fit(rows: list[LabelledRow], first: Scores, second: Scores, tolerance: float) -> Fit:
    verdicts = first.verdicts(None), second.verdicts(None)
    return fit_band(labels_of(rows), first.unsafe, *verdicts, tolerance)


def _by_direction(
    rows: list[LabelledRow], first: Scores, second: Scores, tolerance: float
) -> dict[Direction, Fit]:
    """A fit for each direction that has safe and unsafe rows."""
    fits = {}
    for way in Direction:
        own = [at for at, row in enumerate(rows) if row.direction is way]
        kept = [rows[at] for at in own]
        if len({row.unsafe for row in kept}) == 2:
            fits[way] = _fit(kept, first.take(own), second.take(own), tolerance)
    return fits


def _by_language(
    rows: list[LabelledRow], first: Scores, second: Scores, fits: Mapping[Direction, Fit]
) -> list[dict[str, Any]]:
    """For each direction and language, what the direction's band comes to: nothing is fitted to a
    language, whose rows are few."""
    labels, verdicts = labels_of(rows), (first.verdicts(None), second.verdicts(None))
    found = []
    for way, fit in fits.items():
        up = sent(first.unsafe, fit.chosen.band)
        cascade = np.where(up, verdicts[1], verdicts[0])
        for language in sorted({row.language for row in rows if row.direction is way}):
            here = np.array([row.direction is way and row.language == language for row in rows])
            unsafe, safe = here & labels, here & ~labels
            one: dict[str, Any] = {"direction": way.value, "language": language}
            one |= {"rows": int(here.sum()), "sent": float(up[here].mean())}
            for who, fired in zip(
                ("first", "second", "cascade"), (*verdicts, cascade), strict=True
            ):
                recall = float(fired[unsafe].mean()) if unsafe.any() else None
                one[who] = {
                    "recall": recall,
                    "fpr": float(fired[safe].mean()) if safe.any() else None,
                }
            found.append(one)
    return found


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
    if len(report["directions"]) > 1:
        for way, fit in report["directions"].items():
            to.print(_alone_and_together(fit, f"{way.capitalize()}s alone and together"))
    if len(report["languages"]) > 1:
        to.print(_languages(report["languages"]))
    if (band := _for_policy(report)) is None:
        to.print("the first guard is as good as the second on these rows: no band is needed")
        return
    to.print("for the policy; measure it on rows that it was not fitted to:")
    to.print(f"cascade:\n  band: {band}")


def _for_policy(report: Mapping[str, Any]) -> str | None:
    """The band, or one for each direction where there are rows of both; None: none is needed."""
    fits = {way: fit["cascade"]["band"] for way, fit in report["directions"].items()}
    if len(fits) < 2:
        band = report["cascade"]["band"]
        return str(list(band)) if band else None
    bands = ", ".join(f"{way}: {list(band)}" for way, band in fits.items() if band)
    return f"{{{bands}}}" if bands else None


def _languages(found: list[Mapping[str, Any]]) -> Table:
    columns = ("rows", "sent up", *(f"{who} recall, FPR" for who in ("first", "second", "cascade")))
    table = _table("By direction and language, each with its direction's band", *columns)
    for one in found:
        cells = [_pair(one[who]) for who in ("first", "second", "cascade")]
        name = f"{one['direction']} {one['language']}"
        table.add_row(printable(name), str(one["rows"]), f"{one['sent']:.1%}", *cells)
    return table


def _pair(figures: Mapping[str, float | None]) -> str:
    return ", ".join("-" if one is None else f"{one:.3f}" for one in figures.values())


def _alone_and_together(report: Mapping[str, Any], title: str = "Alone and together") -> Table:
    title = f"{title}, band {_band(report['cascade'])}"
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
