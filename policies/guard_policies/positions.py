"""Hostile YAML to nodes with positions; every mistake is collected with file, line and column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import yaml
from yaml.error import Mark, MarkedYAMLError
from yaml.events import AliasEvent, Event
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 256 * 1024
_MAX_DEPTH = 12
_MAX_NODES = 100_000  # with what aliases repeat
_MAX_PROBLEMS = 100
_CORE = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    _CORE + kind
    for kind in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)
# Controls, line separators, bidirectional overrides, lone surrogates.
_UNPRINTABLE = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# YAML 1.1 reads these as booleans, and people write them for "off" and "on".
_NEGATIVE = {"no", "n", "false", "none", "null", "~", "disabled", "ignore"}


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in a file; line and column count from 1."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PolicyError(ValueError):
    """Everything that is wrong with one or more files, sorted by position."""

    def __init__(self, problems: Collection[Problem]) -> None:
        self.problems = tuple(sorted(problems))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` of a mapping."""

    key: ScalarNode
    value: Node


class Reader:
    """Reads typed values out of one file's nodes; what is wrong is collected, not raised.

    The methods return None (or what was readable) after reporting a problem. `check` raises. With
    `aliases` a file may repeat what an anchor names, unless that has aliases in it: so what a file
    says grows no faster than its square, and no further than a bound.
    """

    def __init__(self, file: str, aliases: bool = False) -> None:
        self.file, self._aliases = file, aliases
        self.problems: list[Problem] = []

    def report(self, where: Node | Mark | None, message: str) -> None:
        """Note a mistake. Raises PolicyError when there are too many to be worth more time."""
        mark = where.start_mark if isinstance(where, Node) else where
        self._report_at(mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, message)

    def check(self) -> None:
        """Raise PolicyError if anything was reported."""
        if self.problems:
            raise PolicyError(self.problems)

    def compose(self, data: bytes | str) -> MappingNode:
        """The file's one document, which must be a mapping. Raises PolicyError otherwise."""
        root = self._compose(data)
        if root is None:
            raise PolicyError(self.problems)
        return root

    def _compose(self, data: bytes | str) -> MappingNode | None:
        text = self._decode(data)
        if text is None:
            return None
        try:
            loader = _Composer(text, self._aliases)
            try:
                root = loader.get_single_node()
            finally:
                loader.dispose()
        except _Refused as error:
            self.report(error.problem_mark, str(error.problem))
            return None
        except MarkedYAMLError as error:
            said = ", ".join(one for one in (error.context, error.problem) if one)
            self.report(error.problem_mark or error.context_mark, f"not YAML: {said}")
            return None
        except yaml.reader.ReaderError as error:
            place = _line_and_column(text, error.position)
            self._report_at(*place, "a control character is not allowed")
            return None
        if isinstance(root, MappingNode):
            return root
        self.report(root, "must be a mapping of `key: value` lines; it is " + _kind(root))
        return None

    def table(self, node: Node, what: str, known: Collection[str] | None) -> dict[str, Entry]:
        """A mapping's entries by key; with `known`, other keys are refused, with a hint."""
        if not isinstance(node, MappingNode):
            self.report(node, f"{what} must be a mapping, not {_kind(node)}")
            return {}
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self.report(key, f"a key of {what} must be a word, not {_kind(key)}")
            elif (earlier := entries.get(key.value)) is not None:
                line = earlier.key.start_mark.line + 1
                self.report(key, f"{quote(key.value)} is given twice; first in line {line}")
            elif known is not None and key.value not in known:
                self.report(key, f"{what} has no key {quote(key.value)}{suggest(key.value, known)}")
            else:
                entries[key.value] = Entry(key, value)
        return entries

    def items(self, node: Node, what: str) -> Iterator[Node]:
        """The items of a list."""
        if isinstance(node, SequenceNode):
            yield from node.value
        else:
            self.report(node, f"{what} must be a list, not {_kind(node)}")

    def text(self, node: Node, what: str, longest: int) -> str | None:
        """Text as it stands in the file, whatever YAML takes it for (`1.10`, `no`), stripped."""
        if not isinstance(node, ScalarNode) or node.tag == _CORE + "null":
            self.report(node, f"{what} must be text, not {_kind(node)}")
            return None
        value = str(node.value).strip()
        if not value:
            self.report(node, f"{what} is empty")
        elif len(value) > longest:
            self.report(node, f"{what} has {len(value)} characters; {longest} are allowed")
        elif (bad := _UNPRINTABLE.search(value)) is not None:
            point = f"U+{ord(bad.group()):04X}"
            self.report(node, f"{what} holds {point}, a control character or half a surrogate pair")
        else:
            return value
        return None

    def word(self, node: Node, what: str, words: Collection[str]) -> str | None:
        """One of the words. Knows that YAML takes a plain `off` for false."""
        listed = ", ".join(words)
        if not isinstance(node, ScalarNode) or not node.value:
            self.report(node, f"{what} must be one of {listed}, not {_kind(node)}")
            return None
        value = str(node.value)
        if value in words:
            return value
        off = "off" in words and value.lower() in _NEGATIVE
        hint = "; did you mean 'off'?" if off else suggest(value, words)
        self.report(node, f"{what} must be one of {listed}, not {quote(value)}{hint}")
        return None

    def number(self, node: Node, what: str, low: float, high: float) -> float | None:
        """A finite number in [low, high]."""
        value = _number(node)
        if value is None:
            shown = quote(node.value) if isinstance(node, ScalarNode) else _kind(node)
            quoted = isinstance(node, ScalarNode) and node.style in ("'", '"')
            hint = "; write it without quotes" if quoted else ""
            self.report(node, f"{what} must be a number like 0.5, not {shown}{hint}")
        elif not low <= value <= high:
            self.report(node, f"{what} must lie between {low:g} and {high:g}, not {value:g}")
        else:
            return value
        return None

    def integer(self, node: Node, what: str, low: int, high: int) -> int | None:
        """A whole number in [low, high]."""
        value = self.number(node, what, low, high)
        if value is not None and not value.is_integer():
            self.report(node, f"{what} must be a whole number, not {value:g}")
            return None
        return None if value is None else int(value)

    def flag(self, node: Node, what: str) -> bool | None:
        """`true` or `false`."""
        value = self.word(node, what, ("true", "false"))
        return None if value is None else value == "true"

    def _decode(self, data: bytes | str) -> str | None:
        size = len(data)
        if size > MAX_BYTES:
            self.report(None, f"has more than {MAX_BYTES // 1024} KiB; that is too much")
            return None
        if isinstance(data, str):
            return data
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = data[: error.start].decode("utf-8", "replace")
            self._report_at(*_line_and_column(before, len(before)), "is not valid UTF-8")
            return None

    def _report_at(self, line: int, column: int, message: str) -> None:
        self.problems.append(Problem(self.file, line, column, message))
        if len(self.problems) >= _MAX_PROBLEMS:
            self.problems.append(Problem(self.file, line, column, "too many mistakes: stopped"))
            raise PolicyError(self.problems)


class _Refused(MarkedYAMLError):
    """YAML that policies may not use."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Composer(yaml.SafeLoader):
    """Builds nodes only. Aliases, foreign tags and deep nesting are refused before they cost."""

    def __init__(self, text: str, aliases: bool) -> None:
        super().__init__(text)
        self._aliases = aliases
        self._depth = self._anchored = self._nodes = 0
        self._sizes: dict[int, int] = {}  # of what anchors name, by id: how many nodes

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event: Event = self.peek_event()  # type: ignore[no-untyped-call]
        alias = isinstance(event, AliasEvent)
        if alias and not self._aliases:
            raise _Refused("aliases (*name) are not allowed here; write it out", event.start_mark)
        if alias and self._anchored:
            raise _Refused("an alias within what an anchor names; write it out", event.start_mark)
        if self._depth >= _MAX_DEPTH:
            raise _Refused("nested too deep", event.start_mark)
        anchor = not alias and getattr(event, "anchor", None) is not None
        before = self._nodes
        self._nodes += 1
        self._depth += 1
        self._anchored += anchor
        node = super().compose_node(parent, index)
        self._anchored -= anchor
        self._depth -= 1
        if anchor:
            self._sizes[id(node)] = self._nodes - before
        elif alias:
            self._nodes += self._sizes[id(node)]
            if self._nodes > _MAX_NODES:
                raise _Refused("aliases repeat too much", event.start_mark)
        if node is not None and node.tag not in _PLAIN_TAGS:
            raise _Refused(f"the tag {quote(node.tag)} is not allowed here", node.start_mark)
        return node


def quote(value: object) -> str:
    """The value for a message: in quotes, escaped, not longer than a few words."""
    shown = str(value)
    return repr(shown if len(shown) <= 60 else shown[:57] + "...")


def suggest(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, if there is one."""
    near = difflib.get_close_matches(word[:60], known, n=1, cutoff=0.6)
    folded = [one for one in known if one.lower() == word.lower()]
    best = (folded or near)[:1]
    return f"; did you mean {best[0]!r}?" if best else ""


def _line_and_column(text: str, index: int) -> tuple[int, int]:
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def _number(node: Node) -> float | None:
    if not isinstance(node, ScalarNode) or node.style is not None:
        return None
    if not _NUMBER.fullmatch(node.value) or len(node.value) > 40:
        return None
    value = float(node.value)
    return value if isfinite(value) else None


def _kind(node: Node | None) -> str:
    match node:
        case None:
            return "empty"
        case MappingNode():
            return "a mapping"
        case SequenceNode():
            return "a list"
        case _:
            return quote(node.value) if node.value else "empty"
