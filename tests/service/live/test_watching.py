"""Files that change: what is loaded is what was there at one time, and nothing else is used."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from guard_service.live.watching import LOOKED_INTO, Unsettled, Watched, Watcher, contents
from tests.service.asking import until

SOON_S = 0.01


@dataclass
class Seen:
    """A thing made of the texts of a folder's files, and everything that was made of it."""

    folder: Path
    used: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    while_loading: Callable[[], None] = lambda: None

    def load(self) -> str:
        texts = [file.read_text() for file in sorted(self.folder.glob("*.yaml"))]
        self.while_loading()
        if "broken" in "".join(texts):
            raise ValueError("broken")
        return "".join(texts)

    async def use(self, loaded: str) -> None:
        self.used.append(loaded)

    def watched(self) -> Watched[str]:
        return Watched("texts", [self.folder], self.load, self.use, self.errors.append)


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    (tmp_path / "a.yaml").write_text("one")
    return Seen(tmp_path)


@pytest.fixture
async def watcher(seen: Seen) -> AsyncIterator[Watcher]:
    watcher = Watcher(SOON_S, settle_s=0.0)
    watcher.add(seen.watched())
    yield watcher
    await watcher.close()


async def test_a_change_is_loaded_and_a_broken_one_leaves_what_is_used(
    seen: Seen, watcher: Watcher
) -> None:
    watcher.start()
    await until(lambda: seen.used == ["one"])
    (seen.folder / "a.yaml").write_text("broken")
    await until(lambda: len(seen.errors) == 1)
    (seen.folder / "b.yaml").write_text(" and more")
    await until(lambda: len(seen.errors) == 2)
    (seen.folder / "a.yaml").write_text("two")
    await until(lambda: seen.used[1:] == ["two and more"])
    assert len(seen.errors) == 2


async def test_what_stays_the_same_is_loaded_once(seen: Seen, watcher: Watcher) -> None:
    looks = 0

    def counted(paths: object) -> bytes:
        nonlocal looks
        looks += 1
        return contents([seen.folder])

    counting = Watcher(SOON_S, settle_s=0.0)
    counting.add(Watched("texts", [seen.folder], seen.load, seen.use, seen.errors.append, counted))
    counting.start()
    await until(lambda: looks > 20)
    await counting.close()
    assert seen.used == ["one"]


async def test_told_it_loads_again_what_did_not_change(seen: Seen) -> None:
    watcher = Watcher(0.0, settle_s=0.0)
    watcher.add(seen.watched())
    watcher.start()
    watcher.now()
    await until(lambda: len(seen.used) == 1)
    watcher.now()
    await until(lambda: len(seen.used) == 2)
    await watcher.reload("another")
    await watcher.reload("texts")
    assert seen.used == ["one"] * 3
    await watcher.close()


async def test_what_changed_while_it_was_read_is_not_used(seen: Seen, watcher: Watcher) -> None:
    def change() -> None:
        seen.while_loading = lambda: None
        (seen.folder / "a.yaml").write_text("two")

    seen.while_loading = change
    await watcher.reload()
    assert seen.used == ["two"]
    seen.while_loading = change
    (seen.folder / "a.yaml").write_text("broken")
    await watcher.reload()
    assert seen.used == ["two", "two"] and not seen.errors


async def test_files_that_never_rest_are_an_error(seen: Seen, watcher: Watcher) -> None:
    count = 0

    def change() -> None:
        nonlocal count
        (seen.folder / "a.yaml").write_text(str(count := count + 1))

    seen.while_loading = change
    await watcher.reload()
    assert not seen.used and isinstance(seen.errors[0], Unsettled)


async def test_what_cannot_be_used_is_told(tmp_path: Path) -> None:
    errors: list[Exception] = []

    async def refuse(loaded: str) -> None:
        raise ValueError(f"no {loaded}")

    watcher = Watcher(0.0, settle_s=0.0)
    watcher.add(Watched("it", [tmp_path], lambda: "thanks", refuse, errors.append))
    await watcher.reload()
    assert [str(error) for error in errors] == ["no thanks"]


async def test_the_swap_of_a_config_map_is_one_change(tmp_path: Path) -> None:
    """Kubernetes replaces the link `..data` beneath the links that the folder shows."""
    for version in ("1", "2"):
        (tmp_path / f"..{version}").mkdir()
        for name in ("a.yaml", "b.yaml"):
            (tmp_path / f"..{version}" / name).write_text(version)
    (tmp_path / "..data").symlink_to("..1")
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    seen = Seen(tmp_path)
    watcher = Watcher(SOON_S, settle_s=0.0)
    watcher.add(seen.watched())
    watcher.start()
    await until(lambda: seen.used == ["11"])
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    await until(lambda: len(seen.used) == 2)
    await watcher.close()
    assert seen.used == ["11", "22"]


def test_content_and_names_count_and_nothing_hidden(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = contents([tmp_path])
    (tmp_path / ".hidden").write_text("1")
    os.utime(tmp_path / "a", (1, 1))
    assert contents([tmp_path]) == first
    (tmp_path / "a").rename(tmp_path / "b")
    second = contents([tmp_path])
    (tmp_path / "b").write_text("2")
    assert len({first, second, contents([tmp_path]), contents([tmp_path / "gone"])}) == 4


def test_a_pipe_is_not_waited_for_and_a_large_file_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(LOOKED_INTO + 1)
    first = contents([tmp_path, tmp_path / "large"])
    assert contents([tmp_path, tmp_path / "large"]) == first
    os.utime(tmp_path / "large", (1, 1))
    assert contents([tmp_path, tmp_path / "large"]) != first
