"""Scores in a file while they are made, in the lines of `guardctl eval --scores`.

So an interrupted evaluation goes on behind the last line, and either command reads the other's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from guard_quantization.data import Row
from guard_quantization.evaluation.evaluate import Judge, scored
from guard_quantization.training import Report
from guard_service.engines import ModelCard
from guard_service.evaluation.scores import Scores, read_scores

_CHUNK = 512  # rows that are judged between two writes


def keep_scores(
    path: Path, rows: Sequence[Row], open_judge: Callable[[], Judge], what: str = "judge"
) -> Scores:
    """Scores of the rows; those that `path` lacks are judged now and written behind the others.

    `open_judge` is called only when there are any. Raises DataError for a file of other rows.
    """
    done = _whole_lines(path)
    if done < len(rows):
        with closing(open_judge()) as judge:
            _judge(judge, rows, done, path, what)
    return read_scores(path, rows)


def _judge(judge: Judge, rows: Sequence[Row], done: int, path: Path, what: str) -> None:
    report = Report(what, len(rows))
    try:
        for begin in range(done, len(rows), _CHUNK):
            part = rows[begin : begin + _CHUNK]
            found = scored(judge, part, partial(_at, report, begin))
            with path.open("ab") as file:
                file.writelines(_lines(part, found, judge.card))
                file.flush()
                os.fsync(file.fileno())
    finally:
        report.close()


def _at(report: Report, begin: int, count: int) -> None:
    report.at(begin + count, "")


def _lines(rows: Sequence[Row], scores: Scores, card: ModelCard) -> Iterator[bytes]:
    """Scores are whole floats: a file gives the figures that memory would."""
    by = {"model": card.name, "model_digest": card.digest.removeprefix("sha256:")[:12]}
    for at, row in enumerate(rows):
        line: dict[str, Any] = {"id": row.id, "action": None, "unsafe_score": None, "scores": {}}
        line["error"] = scores.failures.get(at)
        if at not in scores.failures:
            unsafe = float(scores.unsafe[at])
            shares = zip(scores.columns, scores.codes[at].tolist(), strict=True)
            line["action"] = "block" if unsafe >= 0.5 else "allow"
            line["unsafe_score"] = unsafe
            line["scores"] = {code: min(1.0, unsafe * share) for code, share in shares if share}
        yield json.dumps({**line, **by, "policy": "none"}).encode() + b"\n"


def _whole_lines(path: Path) -> int:
    """How many lines are there; what a killed run left of one is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content.count(b"\n")
