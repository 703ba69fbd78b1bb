"""Labelled rows: reading them, contrast families, and how an epoch is mixed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from guard_policies.assessment import Direction
from guard_policies.taxonomy import BY_CODE
from guard_quantization.data import (
    Row,
    Share,
    contrast_rows,
    probe_rows,
    read_folder,
    sample_epoch,
)
from guard_service.evaluation.rows import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

HELLO = [{"role": "user", "content": "hello"}]


def item(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "id": "a-1",
        "messages": HELLO,
        "target_role": "user",
        "label": "safe",
        "categories": [],
        "language": "en",
        "source": "a",
        "split": "train",
    }
    return base | changes


def row(number: int, *, unsafe: bool, source: str, file: str = "f", code: str = "S1") -> Row:
    codes = (code,) if unsafe else ()
    return Row(str(number), (("user", "x"),), unsafe, codes, "en", source, file, "train")


def test_rows_are_read_from_plain_and_compressed_files(tmp_path: Path) -> None:
    line = json.dumps(item()) + "\n"
    (tmp_path / "one.jsonl").write_text(line)
    with gzip.open(tmp_path / "two.jsonl.gz", "wt") as file:
        file.write(line)
    rows = read_folder(tmp_path)
    assert [r.file for r in rows] == ["one", "two"]
    assert rows[0].turns == (("user", "hello"),)
    assert rows[0].direction is Direction.PROMPT


def test_an_unknown_code_stays_unknown_and_is_not_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(item(label="unsafe", categories=None)) + "\n")
    assert read_folder(tmp_path)[0].categories is None


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("not json", "not a labelled row in JSON"),
        ("{}", "the row has no 'label'"),
        (json.dumps(item(label="maybe")), "label must be safe or unsafe"),
        (json.dumps(item(split=3)), "split must be a text"),
        (json.dumps(item(messages=[{"role": "user"}])), "the row has no 'content'"),
        (
            json.dumps(item(messages=[{"role": "user", "content": ["secret"]}])),
            "content of messages must be a text",
        ),
        (
            json.dumps(item(messages=[{"role": "system", "content": ""}, *HELLO])),
            "messages must be the user's or the assistant's",
        ),
    ],
)
def test_a_broken_line_is_named_and_not_quoted(tmp_path: Path, broken: str, said: str) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(item()) + "\n" + broken + "\n")
    with pytest.raises(DataError, match=rf"one\.jsonl:2: {said}$"):
        read_folder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.jsonl"):
        read_folder(tmp_path)


def test_contrast_families_are_labelled_with_known_codes_and_never_contradict_themselves() -> None:
    rows = contrast_rows()
    assert all(set(r.categories or ()) <= BY_CODE.keys() for r in rows)
    assert all(bool(r.categories) == r.unsafe for r in rows)
    labels: dict[tuple[tuple[str, str], ...], bool] = {}
    for r in rows:
        assert labels.setdefault(r.turns, r.unsafe) == r.unsafe, r.turns
    assert not any("{a}" in text or "{b}" in text for r in rows for _, text in r.turns)


def test_probe_rows_are_not_among_the_contrast_families() -> None:
    trained = {r.turns[-1][1].lower() for r in contrast_rows()}
    probe = probe_rows()
    assert len(probe) > 700
    shared = [r for r in probe if r.turns[-1][1].lower() in trained]
    assert len(shared) <= len(probe) // 100, [r.id for r in shared]


def test_an_epoch_keeps_the_ratio_of_labels_and_lifts_small_sources() -> None:
    rows = [row(n, unsafe=n % 4 == 0, source="big") for n in range(4000)]
    rows += [row(9000 + n, unsafe=True, source="small") for n in range(100)]
    epoch = sample_epoch(rows, [Share("f", 1000, 0.5)], seed=1)
    unsafe = sum(r.unsafe for r, _ in epoch)
    assert abs(unsafe / len(epoch) - 1100 / 4100) < 0.02
    counts = Counter(r.source for r, _ in epoch if r.unsafe)
    assert counts["small"] / unsafe > 0.2  # 9 % of the rows, by the square root 24 %
    assert {weight for _, weight in epoch} == {0.5}


def test_an_epoch_is_the_same_for_the_same_seed_and_repeats_a_row_at_most_once() -> None:
    rows = [row(n, unsafe=False, source="tiny") for n in range(10)]
    epoch = sample_epoch(rows, [Share("f", 1000)], seed=3)
    assert epoch == sample_epoch(rows, [Share("f", 1000)], seed=3)
    assert set(Counter(r.id for r, _ in epoch).values()) == {2}


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_the_shared_data_is_read_whole() -> None:
    rows = read_folder(SHARED)
    assert len(rows) > 150_000
    assert all(r.turns[-1][0] in ("user", "assistant") for r in rows)
