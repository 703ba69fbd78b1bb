"""What `guardctl eval` does: bulk judges the rows, figures are made of its lines."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard_service.cli import bulk_run, exits
from guard_service.cli.place import Place
from guard_service.evaluation.gate import (
    Limits,
    LimitsError,
    read_limits,
    read_report,
    violations,
)
from guard_service.evaluation.report import OVER_REFUSAL, evaluate, write_new
from guard_service.evaluation.rows import DataError, LabelledRow, data_files, read_rows
from guard_service.evaluation.scores import Scores, read_scores
from guard_service.evaluation.show import show_report


@dataclass(frozen=True, slots=True)
class What:
    """Which rows, where their verdicts are kept, and how they are counted."""

    data: Path
    split: str
    scores: Path | None
    threshold: float | None
    over_refusal: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to come of it."""

    out: Path | None
    gate: Path | None
    reference: Path | None
    as_json: bool


def run(what: What, wanted: Wanted, place: Place, how: bulk_run.How) -> int:
    """Judge, report, and hold the report against the limits; the exit code."""
    try:
        limits, reference = _limits(wanted)
        with tempfile.TemporaryDirectory(prefix="guardctl-eval-") as folder:
            rows, scores = _judged(what, Path(folder), place, how)
        patterns = what.over_refusal or OVER_REFUSAL
        report = evaluate(rows, scores, what.threshold, patterns)
        if wanted.out:
            write_new(wanted.out, json.dumps(report, indent=1) + "\n")
    except (DataError, LimitsError, ValueError) as wrong:
        exits.fail(str(wrong), exits.USAGE)
    except OSError as wrong:
        exits.fail(f"cannot read or write: {wrong}")
    except _Ended as end:
        return end.code
    if wanted.as_json:
        print(json.dumps(report))
    else:
        show_report(report)
    return _verdict(report, limits, reference)


class _Ended(Exception):
    """The run stopped before the end."""

    def __init__(self, code: int) -> None:
        self.code = code


def _limits(wanted: Wanted) -> tuple[Limits | None, dict[str, Any] | None]:
    """What is wanted, checked before any row is judged."""
    if wanted.out and not wanted.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {wanted.out.absolute().parent}")
    if wanted.out and wanted.out.exists():
        raise ValueError(f"{wanted.out} exists; reports are never written over")
    limits = reference = None
    if wanted.gate:
        limits = read_limits(wanted.gate.read_bytes(), str(wanted.gate))
    if wanted.reference:
        reference = read_report(wanted.reference.read_bytes(), str(wanted.reference))
    if limits and limits.need_reference and reference is None:
        raise ValueError("the limits compare with a reference report: name it with --reference")
    if limits and limits.agreement:
        raise ValueError("agreement needs two guards: it is a limit of guard-quantize evaluate")
    return limits, reference


def _judged(
    what: What, folder: Path, place: Place, how: bulk_run.How
) -> tuple[list[LabelledRow], Scores]:
    """The rows and what the guard says of them; asks it only for what is not in the file yet."""
    chosen = folder / "rows.jsonl"
    rows = _chosen(what, chosen)
    kept = what.scores or folder / "scores.jsonl"
    if how.restart or not _finished(kept, rows):
        code = bulk_run.run(chosen, kept, place, how)
        if code in (exits.UNFINISHED, exits.INTERRUPTED):
            if what.scores is None:
                _say("nothing was kept; with --scores FILE a later run can go on")
            raise _Ended(code)
    return rows, read_scores(kept, rows)


def _chosen(what: What, to: Path) -> list[LabelledRow]:
    """The rows of the split; their conversations, without labels, are written for bulk."""
    rows = []
    with to.open("w", encoding="utf-8") as file:
        for row, line in read_rows(data_files(what.data), what.split):
            asked = {"id": row.id, "language": row.language}
            own = {key: line[key] for key in ("messages", "target_role") if key in line}
            file.write(json.dumps({**asked, **own}) + "\n")
            rows.append(row)
    if not rows:
        raise DataError(f"{what.data}: no row" + (f" of split {what.split!r}" * bool(what.split)))
    return rows


def _finished(kept: Path, rows: Sequence[LabelledRow]) -> bool:
    """Whether a file holds the scores of all rows; whatever else is wrong, bulk will say."""
    try:
        read_scores(kept, rows)
    except (DataError, OSError):
        return False
    return True


def _verdict(
    report: dict[str, Any], limits: Limits | None, reference: dict[str, Any] | None
) -> int:
    """The exit code; says on standard error what is wrong."""
    unjudged = report["unjudged"]["rows"]
    if unjudged:
        _say(f"{unjudged} rows have no verdict and are in no figure")
    if limits is None:
        return exits.NO_VERDICT if unjudged else exits.OK
    broken = violations(limits, report, reference)
    for one in broken:
        _say(f"limit broken: {one}")
    if not broken:
        _say(f"all {limits.count} limits hold")
    return exits.NO_VERDICT if broken else exits.OK


def _say(message: str) -> None:
    print(f"guardctl: {exits.printable(message)}", file=sys.stderr, flush=True)
