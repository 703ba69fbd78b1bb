"""An audit log is carried on over segments, restarts, crashes and full disks."""

from __future__ import annotations

import errno
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guard_service.audit import files
from guard_service.audit.files import HEAD, segments
from guard_service.audit.keys import AuditError, read_keys
from guard_service.audit.log import Log
from guard_service.audit.verifying import Tampered
from tests.service.audit.logs import KEYS, OTHER, checked, entry, lines, written


def opened(folder: Path, **options: Any) -> Log:
    return Log(folder, KEYS, options.get("segment_bytes", 10_000), options.get("fsync", False))


def test_lines_follow_each_other_over_restarts(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    for count in (3, 1, 4):
        written(folder, count)
    found = checked(folder)
    assert [one["n"] for one in lines(folder)] == list(range(found.lines))
    assert found.kinds["verdict"] == 8 and not found.notes
    assert len({one["log"] for one in lines(folder) if one["kind"] == "segment"}) == 1


def test_floats_read_as_they_were_written(tmp_path: Path) -> None:
    scores = [0.1, 1 / 3, 5e-324, 1.0, math.nextafter(0.7, 1)]
    log = opened(tmp_path / "log")
    log.append([entry(0, scores=scores)])
    log.stop()
    assert lines(tmp_path / "log")[1]["scores"] == scores


def test_files_are_private_and_the_folder_must_not_be_everybodys(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    folder.chmod(0o777)
    with pytest.raises(AuditError, match=f"chmod o-w {folder}"):
        opened(folder)


def test_one_process_writes_a_log(tmp_path: Path) -> None:
    log = opened(tmp_path / "log")
    with pytest.raises(AuditError, match="another process writes"):
        opened(tmp_path / "log")
    log.stop()
    opened(tmp_path / "log").stop()


def test_another_key_does_not_go_on_with_a_log(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    with pytest.raises(AuditError, match="right key"):
        Log(folder, OTHER, 10_000, fsync=False)
    assert checked(folder).ended  # untouched
    opened(folder).stop()  # and free


def test_a_killed_process_leaves_a_log_that_holds_and_goes_on(tmp_path: Path) -> None:
    code = (
        "import os\nfrom pathlib import Path\n"
        "from tests.service.audit.test_log import opened, entry\n"
        f"log = opened(Path({str(tmp_path / 'log')!r}))\n"
        "log.append([entry(n) for n in range(5)])\nos._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert "was killed" in checked(tmp_path / "log").notes[0]
    written(tmp_path / "log", 2)
    found = checked(tmp_path / "log")
    assert found.kinds["verdict"] == 7
    assert any("was killed before audit-000002" in note for note in found.notes)


def test_a_line_that_a_crash_left_unfinished_is_no_tampering_but_stays_told(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "log"
    log = opened(folder)
    log.append([entry(0)])
    log._close()  # as a kill does
    with segments(folder)[-1].open("ab") as file:
        file.write(b'{"n":2,"time"')
    assert any("not whole" in note for note in checked(folder).notes)
    written(folder, 1)
    assert checked(folder).kinds["verdict"] == 2
    path = segments(folder)[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Tampered, match="was cut, or went on"):
        checked(folder)


def test_lines_that_vanish_while_the_server_is_down_are_told_for_good(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", 5, segment_bytes=100_000)
    path = segments(folder)[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    opened(folder).stop()
    with pytest.raises(Tampered, match="missed 4 lines"):
        checked(folder)


def test_a_folder_that_was_emptied_does_not_begin_anew_unseen(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    for path in segments(folder):
        path.unlink()
    opened(folder).stop()
    with pytest.raises(Tampered, match="is missing"):
        checked(folder)


def test_a_segment_that_never_got_its_first_line_is_begun_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "log", 2)
    (folder / files.segment_name(len(segments(folder)) + 1)).write_bytes(b'{"n":')
    written(folder, 2)
    assert checked(folder).kinds["verdict"] == 4


@pytest.mark.parametrize("partly", [0, 7, 200])
def test_a_full_disk_loses_lines_but_not_the_chain(
    partly: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    log = opened(folder, segment_bytes=700)
    log.append([entry(0)])
    real = os.write

    def full(file: int, data: Any) -> int:
        real(file, bytes(data)[:partly])
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                log.append([entry(1), entry(2)])
        assert checked(folder).kinds["verdict"] == 1
    log.append([entry(3)])
    log.stop()
    found = checked(folder)
    assert found.kinds["verdict"] == 2 and found.missed == 6


def test_a_segment_that_cannot_be_mended_is_left_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    log = opened(folder)
    real = os.write

    def broken(file: int, data: Any) -> int:
        real(file, bytes(data)[:9])
        raise OSError(errno.EIO, "Input/output error")

    def unmended(file: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        patch.setattr(os, "ftruncate", unmended)
        with pytest.raises(OSError, match="Input/output"):
            log.append([entry(0)])
    log.append([entry(1)])
    log.stop()
    found = checked(folder)
    assert found.segments == 2 and found.missed == 1


@pytest.mark.parametrize(("secret", "told"), [(b"short\n", "5 bytes"), (None, "No such file")])
def test_keys_that_are_none_say_how_to_make_one(
    secret: bytes | None, told: str, tmp_path: Path
) -> None:
    if secret is not None:
        (tmp_path / "key").write_bytes(secret)
    with pytest.raises(AuditError, match=told):
        read_keys(tmp_path / "key")


def test_the_head_is_replaced_whole(tmp_path: Path) -> None:
    folder = written(tmp_path / "log")
    assert (folder / HEAD).read_bytes().count(b"\n") == 1
    assert not list(folder.glob("*.new"))
