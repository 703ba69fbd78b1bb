"""Scores kept in a file: gone on with after a kill, read by guardctl, failures told."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from guard_quantization.data import Row
from guard_quantization.evaluation import kept
from guard_quantization.evaluation.evaluate import Judge, score_rows
from guard_quantization.evaluation.kept import keep_scores
from guard_service.engines.fake import FakeEngine
from guard_service.evaluation.rows import DataError


def rows(count: int) -> list[Row]:
    """Every other text holds a word that the fake engine knows; they differ in length."""
    return [
        Row(
            f"r{n}",
            (("user", f"{'fake-bomb' if n % 2 else 'cake'} {'x' * (37 * n % 11)}"),),
            n % 2 == 1,
            ("S9",) if n % 2 else (),
            "en",
            "s",
            "f",
            "dev",
        )
        for n in range(count)
    ]


def nobody() -> NoReturn:
    raise AssertionError("there is nothing to judge")


def test_file_holds_what_memory_would_and_is_read_without_a_judge(tmp_path: Path) -> None:
    made = keep_scores(tmp_path / "s.jsonl", rows(5), FakeEngine)
    wanted = score_rows(FakeEngine(), rows(5))
    assert made.unsafe.tolist() == wanted.unsafe.tolist()
    np.testing.assert_allclose(made.codes, wanted.codes * wanted.unsafe[:, None], atol=1e-12)
    assert made.judges[0]["model"] == "fake"
    again = keep_scores(tmp_path / "s.jsonl", rows(5), nobody)
    assert again.unsafe.tolist() == made.unsafe.tolist()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.99])
def test_killed_run_goes_on_behind_its_last_whole_line(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_CHUNK", 2)
    path = tmp_path / "s.jsonl"
    keep_scores(path, rows(7), FakeEngine)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    engines: list[FakeEngine] = []

    def opened() -> Judge:
        engines.append(FakeEngine())
        return engines[0]

    keep_scores(path, rows(7), opened)
    assert path.read_bytes() == whole
    judged = sum(len(batch) for batch in engines[0].batches)
    assert judged == 7 - whole[: int(share * len(whole))].count(b"\n")


def test_text_that_is_none_is_a_failure_and_never_safe(tmp_path: Path) -> None:
    broken = rows(3)
    broken[1] = Row("r1", (("user", "half \ud800"),), True, ("S1",), "en", "s", "f", "dev")
    found = keep_scores(tmp_path / "s.jsonl", broken, FakeEngine)
    assert found.failures == {1: "INVALID_CONVERSATION"} and np.isnan(found.unsafe[1])
    assert found.judged() == [0, 2]


def test_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    keep_scores(tmp_path / "s.jsonl", rows(2), FakeEngine)
    with pytest.raises(DataError, match="belongs to other rows"):
        keep_scores(tmp_path / "s.jsonl", rows(3)[1:], FakeEngine)
