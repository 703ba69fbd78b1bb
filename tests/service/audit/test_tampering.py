"""What may be done to an audit log without its key, each found and told by the place of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from guard_service.audit.chain import sealed
from guard_service.audit.files import HEAD, segment_name, segments
from guard_service.audit.verifying import Tampered, verify
from tests.service.audit.logs import KEYS, OTHER, checked, entry, lines, written

Tamper = Callable[[Path], object]
MIDDLE = 2  # of at least four segments


def path_of(folder: Path, number: int) -> Path:
    return folder / segment_name(number)


def rewritten(folder: Path, number: int, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = path_of(folder, number)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def replaced(folder: Path, old: bytes, new: bytes) -> None:
    path = path_of(folder, MIDDLE)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def last(folder: Path) -> Path:
    return segments(folder)[-1]


def edit_a_score(folder: Path) -> None:
    replaced(folder, b'"unsafe":', b'"unsafe":1')


def change_a_time(folder: Path) -> None:
    replaced(folder, b'"time":"20', b'"time":"19')


def change_a_mac(folder: Path) -> None:
    line = path_of(folder, MIDDLE).read_bytes().splitlines()[1]
    replaced(folder, line[-10:], b"0" * 8 + line[-2:])


def change_only_white_space(folder: Path) -> None:
    replaced(folder, b'"kind":"verdict"', b'"kind": "verdict"')


def write_the_same_json_otherwise(folder: Path) -> None:
    def change(found: list[bytes]) -> list[bytes]:
        return [json.dumps(json.loads(line), sort_keys=True).encode() + b"\n" for line in found]

    rewritten(folder, MIDDLE, change)


def name_a_field_twice(folder: Path) -> None:
    replaced(folder, b'"kind":"verdict"', b'"kind":"verdict","kind":"refused"')


def make_newlines_those_of_windows(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: [line.replace(b"\n", b"\r\n") for line in found])


def delete_a_line(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: found[:1] + found[2:])


def delete_the_first_line(folder: Path) -> None:
    rewritten(folder, 1, lambda found: found[1:])


def delete_the_last_line(folder: Path) -> None:
    path = last(folder)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def delete_a_segments_last_line(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: found[:-1])


def duplicate_a_line(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: [*found[:2], found[1], *found[2:]])


def duplicate_the_last_line(folder: Path) -> None:
    path = last(folder)
    found = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*found, found[-1]]))


def swap_two_lines(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: [found[0], found[2], found[1], *found[3:]])


def swap_lines_of_two_segments(folder: Path) -> None:
    one, two = path_of(folder, MIDDLE), path_of(folder, MIDDLE + 1)
    a, b = (path.read_bytes().splitlines(keepends=True) for path in (one, two))
    a[1], b[1] = b[1], a[1]
    one.write_bytes(b"".join(a))
    two.write_bytes(b"".join(b))


def insert_a_line_without_a_mac(folder: Path) -> None:
    def change(found: list[bytes]) -> list[bytes]:
        return [*found[:2], json.dumps(entry(1)).encode() + b"\n", *found[2:]]

    rewritten(folder, MIDDLE, change)


def insert_a_line_with_a_plain_hash(folder: Path) -> None:
    def change(found: list[bytes]) -> list[bytes]:
        before = json.loads(found[1])
        body = json.dumps({**entry(1), "n": before["n"] + 1, "prev": before["mac"]}).encode()
        mac = hashlib.sha256(body).hexdigest().encode()
        return [*found[:2], body[:-1] + b',"mac":"' + mac + b'"}\n', *found[2:]]

    rewritten(folder, MIDDLE, change)


def chain_it_anew_with_another_key(folder: Path) -> None:
    before = "0" * 64
    for path in segments(folder):
        made = []
        for line in path.read_bytes().splitlines():
            said = {k: v for k, v in json.loads(line).items() if k != "mac"}
            anew, before = sealed({**said, "prev": before}, OTHER.chain)
            made.append(anew + b"\n")
        path.write_bytes(b"".join(made))


def cut_the_last_line_in_half(folder: Path) -> None:
    path = last(folder)
    path.write_bytes(path.read_bytes()[:-40])


def cut_a_line_in_the_middle(folder: Path) -> None:
    rewritten(folder, MIDDLE, lambda found: [found[0], found[1][:50], *found[2:]])


def cut_the_newest_segment_to_its_first_line(folder: Path) -> None:
    path = last(folder)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


def empty_a_segment(folder: Path) -> None:
    path_of(folder, MIDDLE).write_bytes(b"")


def delete_the_first_segment(folder: Path) -> None:
    path_of(folder, 1).unlink()


def delete_a_segment(folder: Path) -> None:
    path_of(folder, MIDDLE).unlink()


def delete_the_newest_segment(folder: Path) -> None:
    last(folder).unlink()


def delete_a_segment_and_close_the_gap(folder: Path) -> None:
    found = segments(folder)
    found[1].unlink()
    for path, number in zip(found[2:], range(2, len(found)), strict=True):
        path.rename(path_of(folder, number))


def rename_two_segments(folder: Path) -> None:
    one, two = path_of(folder, MIDDLE), path_of(folder, MIDDLE + 1)
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)


def name_a_copy_of_a_segment_as_the_next(folder: Path) -> None:
    path_of(folder, len(segments(folder)) + 1).write_bytes(path_of(folder, MIDDLE).read_bytes())


def merge_two_segments(folder: Path) -> None:
    one, two = path_of(folder, MIDDLE), path_of(folder, MIDDLE + 1)
    one.write_bytes(one.read_bytes() + two.read_bytes())
    two.unlink()


def merge_lines_of_another_log_of_the_same_key(folder: Path) -> None:
    other = written(folder / "other")
    taken = path_of(other, MIDDLE).read_bytes().splitlines(keepends=True)[1]
    rewritten(folder, MIDDLE, lambda found: [found[0], taken, *found[2:]])


def put_a_segment_of_another_log_in_place(folder: Path) -> None:
    other = written(folder / "other")
    path_of(folder, MIDDLE).write_bytes(path_of(other, MIDDLE).read_bytes())


def put_another_log_under_the_head(folder: Path) -> None:
    other = written(folder / "other", lines=14)
    for path in segments(folder):
        path.unlink()
    for path in segments(other):
        path.rename(folder / path.name)


def delete_the_head(folder: Path) -> None:
    (folder / HEAD).unlink()


def edit_the_head(folder: Path) -> None:
    head = json.loads((folder / HEAD).read_bytes())
    (folder / HEAD).write_text(json.dumps({**head, "lines": 3}))


def append_nonsense(folder: Path) -> None:
    path = last(folder)
    path.write_bytes(path.read_bytes() + b"nonsense\n")


def append_bytes_behind_a_segment(folder: Path) -> None:
    path = path_of(folder, MIDDLE)
    path.write_bytes(path.read_bytes() + b"\0" * 16)


TAMPERING: list[tuple[Tamper, str]] = [
    (edit_a_score, "audit-000002.jsonl:2: was changed, or written without the key"),
    (change_a_time, "audit-000002.jsonl:1: was changed"),
    (change_a_mac, "audit-000002.jsonl:2: was changed"),
    (change_only_white_space, "audit-000002.jsonl:2: was changed"),
    (write_the_same_json_otherwise, "audit-000002.jsonl:1: is not a line"),
    (name_a_field_twice, "audit-000002.jsonl:2: was changed"),
    (make_newlines_those_of_windows, "audit-000002.jsonl:1: is not a line"),
    (delete_a_line, "audit-000002.jsonl:2: 1 lines before it are missing"),
    (delete_the_first_line, "audit-000001.jsonl:1: is not a segment's first line"),
    (delete_the_last_line, "audit.head: 1 lines were cut from the end"),
    (delete_a_segments_last_line, "audit-000003.jsonl:1: the segment before it does not end"),
    (duplicate_a_line, "audit-000002.jsonl:3: is line .* once more"),
    (duplicate_the_last_line, "stands behind the segment's end"),
    (swap_two_lines, "audit-000002.jsonl:2: 1 lines before it are missing"),
    (swap_lines_of_two_segments, "audit-000002.jsonl:2: .* lines before it are missing"),
    (insert_a_line_without_a_mac, "audit-000002.jsonl:3: is not a line"),
    (insert_a_line_with_a_plain_hash, "audit-000002.jsonl:3: was changed, or written without"),
    (chain_it_anew_with_another_key, "audit-000001.jsonl:1: was changed, or written without"),
    (cut_the_last_line_in_half, "audit.head: 1 lines were cut from the end"),
    (cut_a_line_in_the_middle, "audit-000002.jsonl:2: "),
    (cut_the_newest_segment_to_its_first_line, "audit.head: .* lines were cut from the end"),
    (empty_a_segment, "audit-000002.jsonl: is empty"),
    (delete_the_first_segment, "audit-000002.jsonl: segment 1 is missing"),
    (delete_a_segment, "audit-000003.jsonl: segment 2 is missing"),
    (delete_the_newest_segment, "audit.head: .* lines were cut from the end"),
    (delete_a_segment_and_close_the_gap, "audit-000002.jsonl:1: is segment 3, not 2: renamed"),
    (rename_two_segments, "audit-000002.jsonl:1: is segment 3, not 2: renamed"),
    (name_a_copy_of_a_segment_as_the_next, ":1: is segment 2, not .*: renamed"),
    (merge_two_segments, "audit-000002.jsonl:.*: stands behind the segment's end"),
    (merge_lines_of_another_log_of_the_same_key, "audit-000002.jsonl:2: does not follow the line"),
    (put_a_segment_of_another_log_in_place, "audit-000002.jsonl:1: belongs to another log"),
    (put_another_log_under_the_head, "audit.head: belongs to another log"),
    (delete_the_head, "audit.head: is missing"),
    (edit_the_head, "audit.head:1: "),
    (append_nonsense, "is not a line"),
    (append_bytes_behind_a_segment, "audit-000003.jsonl:1: the segment before it was cut, or went"),
]


def test_there_are_twenty_ways_at_least_and_the_log_has_segments(tmp_path: Path) -> None:
    assert len(TAMPERING) >= 20
    found = checked(written(tmp_path / "log"))
    assert found.segments >= MIDDLE + 2 and found.ended and not found.notes
    assert found.kinds["verdict"] == 12


@pytest.mark.parametrize(
    ("tamper", "told"), [pytest.param(*one, id=one[0].__name__) for one in TAMPERING]
)
def test_it_is_found(tamper: Tamper, told: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    tamper(folder)
    with pytest.raises(Tampered, match=told):
        checked(folder)


def test_the_wrong_key_is_told_as_such_a_change(tmp_path: Path) -> None:
    with pytest.raises(Tampered, match=r"audit-000001\.jsonl:1: was changed, or written without"):
        checked(written(tmp_path / "log"), OTHER)


def test_what_only_a_witness_finds_an_older_state_put_back_whole(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    written(folder, lines=3)
    older = {path: path.read_bytes() for path in (*segments(folder), folder / HEAD)}
    written(folder, lines=5)  # goes on
    newer = checked(folder)
    for path in segments(folder):
        path.unlink()
    for path, data in older.items():
        path.write_bytes(data)
    assert checked(folder).lines < newer.lines  # not found by itself: who can write all, can do so
    with pytest.raises(Tampered, match="lines were cut from the end"):
        checked(folder, reaches=(newer.lines, newer.last))


def test_copies_without_a_head_hold_unless_something_else_is_wrong(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    assert verify(segments(folder), None, KEYS).ended
    delete_the_last_line(folder)
    assert "no last line" in verify(segments(folder), None, KEYS).notes[0]


def test_older_segments_may_be_put_away_by_their_owner(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    delete_the_first_segment(folder)
    assert checked(folder, first=2).lines == len(lines(folder)) + int(lines(folder)[0]["n"])
    with pytest.raises(Tampered, match="segment 3 is missing"):
        checked(folder, first=3)
