"""Labelled rows of data files: what figures need to know of them, and never their text."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from guard_policies.assessment import Direction

_MAX_LINE_BYTES = 16 * 2**20
_SUFFIXES = (".jsonl", ".jsonl.gz")


class DataError(ValueError):
    """A file is not what it should be; the text names file, line and field, and no content."""


class Labelled(Protocol):
    """A labelled row. `categories`: None for unsafe without a code, empty for safe."""

    @property
    def id(self) -> str: ...
    @property
    def unsafe(self) -> bool: ...
    @property
    def categories(self) -> tuple[str, ...] | None: ...
    @property
    def language(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def direction(self) -> Direction: ...


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row without its text; `file` is the file's name without .jsonl.gz."""

    id: str
    unsafe: bool
    categories: tuple[str, ...] | None
    language: str
    source: str
    file: str
    group: str
    direction: Direction


def data_files(place: Path) -> list[Path]:
    """The data file itself, or those of a folder by name. Raises DataError when there is none."""
    if place.is_file():
        return [place]
    found = sorted(path for path in place.glob("*.jsonl*") if path.name.endswith(_SUFFIXES))
    if not found:
        raise DataError(f"{place}: no .jsonl or .jsonl.gz file here")
    return found


def read_rows(
    files: Sequence[Path],
    split: str = "",
    check: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> Iterator[tuple[LabelledRow, dict[str, Any]]]:
    """Each row and the line it was made of, in order; with `split`, rows of that split only.

    Raises DataError for a line outside the schema, at that line; and for one that `check`, which
    sees lines within it, refuses with a ValueError.
    """
    for path in files:
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        for number, raw in read_lines(path):
            try:
                line = json.loads(raw)
                if split and line["split"] != split:
                    continue
                row = _row(line, name)
                check(line)
            except KeyError as missing:
                raise DataError(f"{path}:{number}: the row has no {missing.args[0]!r}") from None
            except (TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
                raise DataError(f"{path}:{number}: not a labelled row in JSON") from None
            except ValueError as wrong:
                raise DataError(f"{path}:{number}: {wrong}") from None
            yield row, line


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; .gz is unpacked.

    Raises DataError for a packed file that is broken and for a line without end.
    """
    number = 0
    try:
        with cast(BinaryIO, (gzip.open if path.suffix == ".gz" else open)(path, "rb")) as stream:
            while raw := stream.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > _MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line is over {_MAX_LINE_BYTES} bytes")
                if raw.strip():
                    yield number, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as broken:
        raise DataError(f"{path}: the file is broken: {broken}") from None


def _row(line: dict[str, Any], file: str) -> LabelledRow:
    if line["label"] not in ("safe", "unsafe"):
        raise ValueError("label must be safe or unsafe")
    unsafe, codes = line["label"] == "unsafe", line.get("categories")
    roles = [turn["role"] for turn in line["messages"]]
    if not roles or roles[-1] not in ("user", "assistant"):
        raise ValueError("the last of messages must be the user's or the assistant's")
    listed = codes is None or isinstance(codes, list)
    if not listed or not all(isinstance(code, str) for code in codes or ()):
        raise ValueError("categories must be a list of codes, or null")
    return LabelledRow(
        id=_text(line["id"], "id"),
        unsafe=unsafe,
        categories=tuple(codes or ()) if not unsafe or codes is not None else None,
        language=_text(line.get("language", ""), "language"),
        source=_text(line.get("source", ""), "source"),
        file=file,
        group=_text(line.get("group", ""), "group"),
        direction=Direction.RESPONSE if roles[-1] == "assistant" else Direction.PROMPT,
    )


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text")
    return value.encode(errors="replace").decode()  # half a surrogate pair cannot be written down
