"""Labelled conversations: shared data files, contrast families, probe sets; how they are mixed."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from guard_policies.assessment import Direction
from guard_service.evaluation.rows import data_files
from guard_service.evaluation.rows import read_rows as read_labelled


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled conversation; the last turn is judged."""

    id: str
    turns: tuple[tuple[str, str], ...]  # (role, text), roles "user" and "assistant"
    unsafe: bool
    categories: tuple[str, ...] | None  # None: unsafe without a code; () when safe
    language: str
    source: str
    file: str  # name without .jsonl.gz, for example "prompts_safe"
    split: str  # "train", "dev" or "test"
    group: str = ""  # of a probe row: what it probes
    labelled: bool = True  # False: only a teacher can say; `unsafe` means nothing

    @property
    def direction(self) -> Direction:
        """RESPONSE when the judged turn is the assistant's."""
        return Direction.RESPONSE if self.turns[-1][0] == "assistant" else Direction.PROMPT


def read_rows(*files: Path) -> list[Row]:
    """Rows of .jsonl and .jsonl.gz files, with their texts.

    Raises DataError for a line outside the schema, and for one without texts or a split.
    """
    return [
        Row(
            id=row.id,
            turns=tuple((turn["role"], turn["content"]) for turn in line["messages"]),
            unsafe=row.unsafe,
            categories=row.categories,
            language=row.language,
            source=row.source,
            file=row.file,
            split=line["split"],
            group=row.group,
        )
        for row, line in read_labelled(files, check=_check)
    ]


def _check(line: Mapping[str, Any]) -> None:
    """What must be there to train on a row, or to judge it here. Raises ValueError, KeyError."""
    if not isinstance(line["split"], str):
        raise ValueError("split must be a text")
    for turn in line["messages"]:
        if turn["role"] not in ("user", "assistant"):
            raise ValueError("messages must be the user's or the assistant's")
        if not isinstance(turn["content"], str):
            raise ValueError("content of messages must be a text")


def read_folder(folder: Path) -> list[Row]:
    """Rows of every data file in a folder, in the order of the file names."""
    return read_rows(*data_files(folder))


def probe_rows() -> list[Row]:
    """The probe sets that come with the package: never trained on."""
    folder = resources.files("guard_quantization") / "probe"
    with resources.as_file(folder) as path:
        return read_folder(path)


def contrast_rows(dev_share: int = 20, most_per_family: int = 60) -> list[Row]:
    """Sentences of the contrast families in the package; one family in `dev_share` is dev."""
    folder = resources.files("guard_quantization") / "contrast"
    rows: list[Row] = []
    with resources.as_file(folder) as path:
        for file in sorted(path.glob("*.yaml")):
            families = yaml.load(file.read_text("utf-8"), Loader=yaml.CSafeLoader)
            for family in families:
                rows += _family_rows(family, f"contrast_{file.stem}", dev_share, most_per_family)
    return rows


def _family_rows(family: dict[str, Any], file: str, dev_share: int, most: int) -> list[Row]:
    rng = random.Random(family["family"])
    slots = family.get("slots") or {}
    users = family.get("user") or [""]
    replies = family.get("assistant")
    users = list(_expand(family.get("templates") or users, slots))
    sentences: list[tuple[str, ...]] = [(user,) for user in users]
    if replies:
        sentences = list(itertools.product(users, _expand(replies, slots)))
    if len(sentences) > most:
        sentences = rng.sample(sentences, most)
    split = "dev" if _bucket(family["family"]) % dev_share == 0 else "train"
    roles = ("user", "assistant")
    return [
        Row(
            id=f"{file}-{family['family']}-{n}",
            turns=tuple(zip(roles, texts, strict=False)),
            unsafe=family["label"] == "unsafe",
            categories=tuple(family.get("categories") or ()),
            language=family.get("language", "en"),
            source="contrast",
            file=file,
            split=split,
        )
        for n, texts in enumerate(sentences)
    ]


def _expand(templates: Iterable[str], slots: dict[str, list[str]]) -> Iterator[str]:
    for template in templates:
        names = [name for name in slots if f"{{{name}}}" in template]
        for values in itertools.product(*(slots[name] for name in names)):
            text = template
            for name, value in zip(names, values, strict=True):
                text = text.replace(f"{{{name}}}", str(value))
            yield text


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def cropped(text: str, most: int) -> str:
    """At most about `most` characters: a longer text keeps its beginning and its end."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} ... {text[-(most // 3) :]}"


@dataclass(frozen=True, slots=True)
class Share:
    """How many rows of a file an epoch takes, and the loss weight of each."""

    file: str
    rows: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.weight < 0:
            raise ValueError(f"{self.file}: rows must be 1 at least, their weight not negative")


def sample_epoch(rows: Sequence[Row], mix: Sequence[Share], seed: int) -> list[tuple[Row, float]]:
    """One epoch: from each file its share, balanced over (source, label, code, language).

    Safe and unsafe rows keep the file's ratio. Within a label, cells are drawn from in proportion
    to the square root of their size, so that a large source does not drown a small one; a row is
    repeated at most once.
    """
    by_file: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_file[row.file].append(row)
    epoch: list[tuple[Row, float]] = []
    for share in mix:
        rng = random.Random(f"{seed}/{share.file}")
        owned = by_file.get(share.file, [])
        for unsafe in (False, True):
            labelled = [row for row in owned if row.unsafe is unsafe]
            want = round(share.rows * len(labelled) / max(1, len(owned)))
            epoch += [(row, share.weight) for row in _balanced(labelled, want, rng)]
    random.Random(seed).shuffle(epoch)
    return epoch


def _balanced(rows: Sequence[Row], want: int, rng: random.Random) -> list[Row]:
    cells: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        code = row.categories[0] if row.categories else None
        cells[(row.source, code, row.language)].append(row)
    total = sum(len(cell) ** 0.5 for cell in cells.values())
    drawn: list[Row] = []
    for key in sorted(cells, key=str):
        cell = cells[key]
        take = min(max(1, round(want * len(cell) ** 0.5 / total)), 2 * len(cell))
        for n in range(0, take, len(cell)):
            drawn += rng.sample(cell, min(len(cell), take - n))
    return drawn
