"""The inputs of a sharded run, cut into blocks of lines: the same files give the same blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from guard_service.cli.bulk_lines import Record, read_lines, read_records, record_of
from guard_service.cli.bulk_output import open_input

LINES, ROWS = (".jsonl", ".jsonl.gz"), (".parquet",)
_READ = 2**20


class BadInput(ValueError):
    """The inputs are none that can be read; the text says which."""


@dataclass(frozen=True, slots=True)
class Block:
    """Lines `first` to `first + lines - 1` of a file; of these `records` are not blank.

    `start` is the byte of the unpacked file where they begin; of a Parquet file, the row.
    """

    number: int
    file: str
    first: int
    start: int
    lines: int
    records: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All blocks of all files; `digests` are of the files' bytes, by their names."""

    block_lines: int
    digests: Mapping[str, str]
    blocks: tuple[Block, ...]

    @property
    def records(self) -> int:
        """How many lines of output there are to be."""
        return sum(block.records for block in self.blocks)

    def text(self) -> str:
        """As it is kept beside the output."""
        return json.dumps(asdict(self), indent=1) + "\n"


def files_of(source: Path) -> list[Path]:
    """The input files, in order: one, or those of a folder and of the folders in it."""
    if source.is_file():
        found = [source]
    else:
        found = sorted(path for path in source.rglob("*") if path.is_file())
        found = [path for path in found if _is_input(path)]
    if not found or not all(map(_is_input, found)):
        raise BadInput(f"{source}: there is no file that ends in {', '.join((*LINES, *ROWS))}")
    return found


def _is_input(path: Path) -> bool:
    return path.name.endswith((*LINES, *ROWS)) and not path.name.startswith((".", "_"))


def plan_of(source: Path, block_lines: int) -> Plan:
    """Reads every file once. Raises BadInput, and OSError."""
    blocks: list[Block] = []
    digests = {}
    for path in files_of(source):
        name = path.name if source.is_file() else path.relative_to(source).as_posix()
        digests[name] = _digest(path)
        cut = _cut_rows if path.name.endswith(ROWS) else _cut_lines
        for block in cut(path, block_lines):
            blocks.append(replace(block, number=len(blocks), file=name))
    return Plan(block_lines, digests, tuple(blocks))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut_lines(path: Path, block_lines: int) -> Iterator[Block]:
    first = 1
    start = size = lines = records = 0
    with open_input(path) as (stream, _, _):
        try:
            for raw, length in read_lines(stream):
                size, lines = size + length, lines + 1
                records += raw is None or bool(raw.strip())
                if lines == block_lines:
                    yield Block(0, "", first, start, lines, records)
                    first, start = first + lines, start + size
                    size = lines = records = 0
        except EOFError as broken:
            raise BadInput(f"{path}: {broken}") from None
    if lines:
        yield Block(0, "", first, start, lines, records)


def _cut_rows(path: Path, block_lines: int) -> Iterator[Block]:
    rows = _parquet(path).metadata.num_rows
    for start in range(0, rows, block_lines):
        lines = min(block_lines, rows - start)
        yield Block(0, "", start + 1, start, lines, lines)


def records_of(source: Path, block: Block) -> Iterator[Record]:
    """The block's records; in a folder each knows its file."""
    path = source if source.is_file() else source / block.file
    read = _rows if path.name.endswith(ROWS) else _lines
    for record in read(path, block):
        yield record if source.is_file() else replace(record, file=block.file)


def _lines(path: Path, block: Block) -> Iterator[Record]:
    with open_input(path) as (stream, _, _):
        stream.seek(block.start)
        yield from islice(read_records(stream, block.first), block.records)


def _rows(path: Path, block: Block) -> Iterator[Record]:
    file, seen, number = _parquet(path), 0, block.first
    end = block.start + block.lines
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if seen + rows > block.start and seen < end:
            table = file.read_row_group(group)
            low, high = max(block.start - seen, 0), min(end - seen, rows)
            for row in table.slice(low, high - low).to_pylist():
                yield record_of(_without_nulls(row), number)
                number += 1
        seen += rows


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        how = "pip install 'llama-guard-service[parquet]'"
        raise BadInput(f"{path}: needs pyarrow; {how}") from None
    try:
        return ParquetFile(path)
    except ArrowInvalid:
        raise BadInput(f"{path}: is not a Parquet file") from None


def _without_nulls(value: Any) -> Any:
    """A row as the line it would be: there a field that has no value is not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
