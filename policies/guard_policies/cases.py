"""Decision tables: scores in, expected decisions out, so that a policy's meaning can be tested."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from yaml.nodes import Node

from guard_policies.assessment import Action, Assessment, Direction
from guard_policies.cascade import Why, sent_up
from guard_policies.decide import decide
from guard_policies.loader import builtin_policies, load_policy, read_bytes
from guard_policies.positions import Entry, PolicyError, Problem, Reader, quote, suggest
from guard_policies.schema import Policy, Unscannable

T = TypeVar("T")

FILE_KEYS = ("policy", "cases")
CASE_KEYS = ("name", "direction", "language", "unsafe", "scores", "unscannable", "expect")
_ACTIONS = tuple(action.value for action in Action)
_DIRECTIONS = tuple(direction.value for direction in Direction)
EXPECT_KEYS = (
    "action",
    "shadow_action",
    "fired",
    "joint",
    "unsafe_score",
    "judged",
    "on_unavailable",
    "on_unscannable",
    "refusal",
    "sent_up",
)
STAYS = "no"  # said of what is not sent up


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a decision table, and where it stands. `expect` holds only what it states."""

    file: str
    line: int
    column: int
    name: str
    policy: Policy
    direction: Direction
    language: str
    assessment: Assessment
    unscannable: bool
    expect: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A case and what differs from its expectation; it passed when nothing does."""

    case: Case
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        case = self.case
        said = "; ".join(self.differences) or "ok"
        return f"{case.file}:{case.line}:{case.column}: {case.name}: {said}"


def load_cases(
    paths: Iterable[str | Path], policies: Mapping[str, Policy] | None = None
) -> tuple[Case, ...]:
    """The cases of files and of folders' `*.yaml`, in order. Raises PolicyError with all mistakes.

    A file's `policy` is a name among `policies` (default: the built-in ones) or, ending in .yaml
    or .yml, a path relative to the file.
    """
    known = builtin_policies() if policies is None else policies
    cases: list[Case] = []
    problems: list[Problem] = []
    for path in map(Path, paths):
        for file in sorted(path.glob("*.y*ml")) if path.is_dir() else (path,):
            try:
                cases += _load(file, known)
            except PolicyError as error:
                problems += error.problems
    if problems:
        raise PolicyError(problems)
    return tuple(cases)


def run_cases(cases: Iterable[Case]) -> tuple[CaseResult, ...]:
    """One result per case, in order."""
    return tuple(CaseResult(case, tuple(_differences(case))) for case in cases)


def _differences(case: Case) -> list[str]:
    try:
        found = _found(case)
    except ValueError as error:
        return [str(error)]
    return [
        f"{key} is {_shown(found[key])}, expected {_shown(wanted)}"
        for key, wanted in case.expect.items()
        if found[key] != wanted
    ]


def _found(case: Case) -> dict[str, Any]:
    policy, direction = case.policy, case.direction
    found: dict[str, Any] = {
        "judged": [one.code for one in policy.judged(direction)],
        "on_unavailable": policy.on_unavailable(direction).value,
        "on_unscannable": policy.on_unscannable(direction).value,
        "refusal": policy.refusal(case.language),
    }
    if found.keys() >= case.expect.keys():
        return found
    decision = decide(policy, case.assessment, direction, case.language, case.unscannable)
    shadow = decision.shadow_action
    why = sent_up(policy.cascade, [decision], direction) if policy.cascade else None
    return found | {
        "action": decision.action.value,
        "shadow_action": shadow.value if shadow else None,
        "fired": [one.category.code for one in decision.outcomes if one.fired],
        "joint": decision.joint,
        "unsafe_score": round(decision.unsafe_score, 9),
        "sent_up": why.value if why else STAYS,
    }


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return "absent" if value is None else str(value)


def _load(path: Path, known: Mapping[str, Policy]) -> list[Case]:
    reader = Reader(str(path))
    root = reader.compose(read_bytes(path))
    entries = reader.table(root, "a file of cases", FILE_KEYS)
    for key in FILE_KEYS:
        if key not in entries:
            reader.report(root, f"{key!r} is missing")
    reader.check()
    policy = _policy(reader, entries["policy"].value, path, known)
    rows = [_case(reader, node, policy) for node in reader.items(entries["cases"].value, "cases")]
    reader.check()
    return rows


def _policy(reader: Reader, node: Node, path: Path, known: Mapping[str, Policy]) -> Policy:
    name = reader.text(node, "policy", 200) or ""
    if name.endswith((".yaml", ".yml")):
        return load_policy(path.parent / name)
    if name and name not in known:
        reader.report(node, f"there is no policy {quote(name)}{suggest(name, known)}")
    reader.check()
    return known[name]


def _case(reader: Reader, node: Node, policy: Policy) -> Case:
    entries = reader.table(node, "a case", CASE_KEYS)
    for key in ("name", "expect"):
        if key not in entries:
            reader.report(node, f"{key!r} is missing")
    scores = {code: 0.0 for code in _codes(policy)}
    if (entry := entries.get("scores")) is not None:
        for code, one in reader.table(entry.value, "scores", list(scores)).items():
            scores[code] = reader.number(one.value, code, 0.0, 1.0) or 0.0
    total = min(1.0, sum(scores.values()))
    unsafe = _read(entries, "unsafe", lambda one: reader.number(one, "unsafe", 0.0, 1.0))
    direction = _read(entries, "direction", lambda one: reader.word(one, "direction", _DIRECTIONS))
    return Case(
        file=reader.file,
        line=node.start_mark.line + 1,
        column=node.start_mark.column + 1,
        name=_read(entries, "name", lambda one: reader.text(one, "name", 200)) or "",
        policy=policy,
        direction=Direction(direction or Direction.PROMPT.value),
        language=_read(entries, "language", lambda one: reader.text(one, "language", 35)) or "",
        assessment=Assessment(total if unsafe is None else unsafe, scores),
        unscannable=bool(
            _read(entries, "unscannable", lambda one: reader.flag(one, "unscannable"))
        ),
        expect=_expect(reader, entries["expect"].value, policy) if "expect" in entries else {},
    )


def _codes(policy: Policy) -> list[str]:
    return [category.code for category in policy.categories]


def _read(entries: Mapping[str, Entry], key: str, read: Callable[[Node], T | None]) -> T | None:
    entry = entries.get(key)
    return None if entry is None else read(entry.value)


def _expect(reader: Reader, node: Node, policy: Policy) -> dict[str, Any]:
    entries = reader.table(node, "expect", EXPECT_KEYS)
    if not entries:
        reader.report(node, "expect states nothing")
    wanted: dict[str, Any] = {}
    for key, entry in entries.items():
        wanted[key] = _wanted(reader, key, entry.value, policy)
    return wanted


def _wanted(reader: Reader, key: str, node: Node, policy: Policy) -> Any:
    match key:
        case "fired" | "judged":
            codes = [reader.word(one, key, _codes(policy)) for one in reader.items(node, key)]
            return codes
        case "joint":
            return reader.flag(node, key)
        case "unsafe_score":
            return reader.number(node, key, 0.0, 1.0)
        case "refusal":
            return reader.text(node, key, 2000)
        case "sent_up":
            return reader.word(node, key, (STAYS, Why.IN_BAND.value, Why.CATEGORY.value))
        case "on_unscannable":
            return reader.word(node, key, [one.value for one in Unscannable])
        case _:
            return reader.word(node, key, _ACTIONS)
