"""Policies from files: every mistake of every file at once, never half a policy."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from math import ceil
from pathlib import Path

from yaml.nodes import Node

from guard_policies.positions import MAX_BYTES, PolicyError, Problem, Reader
from guard_policies.resolve import describe, resolve
from guard_policies.schema import Policy
from guard_policies.syntax import read_draft

__all__ = [
    "PolicyError",
    "Problem",
    "builtin_policies",
    "describe",
    "load_policies",
    "load_policy",
    "parse_policy",
    "read_bytes",
]

_SUFFIXES = (".yaml", ".yml")


def load_policy(path: str | Path) -> Policy:
    """The policy in a file. Raises PolicyError with everything that is wrong with it."""
    return _parse(read_bytes(path), str(path))[0]


def parse_policy(text: str | bytes, file: str = "<policy>") -> Policy:
    """The policy in a text; `file` names it in problems. Raises PolicyError."""
    return _parse(text, file)[0]


def load_policies(places: Iterable[str | Path]) -> dict[str, Policy]:
    """All policies of folders (`*.yaml`, `*.yml`; no subfolders, no hidden files) and of files.

    By name, in the order found. Raises PolicyError with the mistakes of all files together; two
    policies of one name are a mistake that names both places.
    """
    policies: dict[str, Policy] = {}
    found: dict[str, Problem] = {}
    problems: list[Problem] = []
    for path in _files(places, problems):
        try:
            policy, where = _parse(read_bytes(path), str(path))
        except PolicyError as error:
            problems.extend(error.problems)
            continue
        if (earlier := found.get(policy.name)) is not None:
            first = f"{earlier.file}:{earlier.line}:{earlier.column}"
            message = f"a policy named {policy.name!r} is already in {first}"
            problems.append(Problem(where.file, where.line, where.column, message))
            continue
        policies[policy.name], found[policy.name] = policy, where
    problems += _wrong_candidates(policies, found)
    if problems:
        raise PolicyError(problems)
    return policies


def _wrong_candidates(
    policies: Mapping[str, Policy], found: Mapping[str, Problem]
) -> Iterator[Problem]:
    """Candidates for the place of nobody, or of another candidate; and of too large a share."""
    known = {**builtin_policies(), **policies}
    shares: Counter[str] = Counter()
    for name, policy in policies.items():
        if (terms := policy.candidate) is None:
            continue
        shares[terms.of] += ceil(terms.share * 1000)
        message = ""
        if terms.of not in known:
            message = f"candidate: there is no policy {terms.of!r} whose place it could take"
        elif known[terms.of].candidate is not None:
            message = f"candidate: policy {terms.of!r} is a candidate itself"
        elif shares[terms.of] > 100_000:
            message = f"candidate: all those for {terms.of!r} have more than 100 % together"
        if message:
            yield replace(found[name], message=message)


@cache
def _builtin() -> tuple[Policy, ...]:
    folder = resources.files("guard_policies") / "builtin"
    files = sorted(one.name for one in folder.iterdir() if one.name.endswith(_SUFFIXES))
    return tuple(parse_policy((folder / name).read_bytes(), f"builtin/{name}") for name in files)


def builtin_policies() -> dict[str, Policy]:
    """The policies that come with the package, by name."""
    return {policy.name: policy for policy in _builtin()}


def read_bytes(path: str | Path) -> bytes:
    """A regular file's bytes, MAX_BYTES + 1 at most. Raises PolicyError; never waits on a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return file.read(MAX_BYTES + 1)
            reason: str | None = "it is not a regular file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "it is not a file name"
    raise PolicyError([Problem(str(path), 1, 1, f"cannot be read: {reason}")])


def _parse(data: str | bytes, file: str) -> tuple[Policy, Problem]:
    """The policy and the place of its name (a Problem without a message)."""
    reader = Reader(file)
    root = reader.compose(data)
    draft = read_draft(reader, root)
    policy = resolve(reader, draft)
    reader.check()
    return policy, _place(file, draft.name_node)


def _place(file: str, node: Node) -> Problem:
    return Problem(file, node.start_mark.line + 1, node.start_mark.column + 1, "")


def _files(places: Iterable[str | Path], problems: list[Problem]) -> list[Path]:
    files: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.is_dir():
            files[place] = None
            continue
        try:
            inside = sorted(place.iterdir())
        except OSError as error:
            problems.append(Problem(str(place), 1, 1, f"cannot be read: {error.strerror}"))
            continue
        files |= {
            path: None
            for path in inside
            if path.suffix in _SUFFIXES and not path.name.startswith(".") and not path.is_dir()
        }
    return list(files)
