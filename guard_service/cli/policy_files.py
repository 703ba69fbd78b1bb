"""What `guardctl policy` does with policy files and decision tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from guard_policies.assessment import Direction
from guard_policies.cases import load_cases, run_cases
from guard_policies.loader import (
    PolicyError,
    builtin_policies,
    describe,
    load_policies,
    load_policy,
)
from guard_policies.schema import Cascade, Policy
from guard_service.cli import exits

_USUAL_CASES = Path("policies/cases")
_SUFFIXES = (".yaml", ".yml")


def lint(paths: Sequence[Path]) -> int:
    """Print every mistake, one a line."""
    try:
        policies = load_policies(paths)
    except PolicyError as wrong:
        for problem in wrong.problems:
            print(exits.printable(str(problem)))
        count = len(wrong.problems)
        print(f"{count} mistake{'s' if count != 1 else ''}", file=sys.stderr)
        return exits.NO_VERDICT
    if not policies:
        exits.fail("no policy files there", exits.USAGE)
    for name, policy in policies.items():
        print(f"ok  {exits.printable(name)} {exits.printable(policy.version)}  {policy.digest}")
    return exits.OK


def show(name: str, as_json: bool) -> int:
    """Print a policy with all defaults filled in."""
    policy = _named(name)
    if as_json:
        print(json.dumps(describe(policy), ensure_ascii=False))
        return exits.OK
    for line in _lines(policy):
        print(exits.printable(line))
    return exits.OK


def test(cases: Sequence[Path], policies: Sequence[Path]) -> int:
    """Run decision tables; print the cases that fail."""
    places = list(cases) or [_USUAL_CASES]
    missing = [place for place in places if not place.exists()]
    if missing:
        exits.fail(f"there is no {missing[0]}", exits.USAGE)
    try:
        loaded = load_cases(places, {**builtin_policies(), **load_policies(policies)})
    except PolicyError as wrong:
        for problem in wrong.problems:
            print(exits.printable(str(problem)))
        return exits.NO_VERDICT
    if not loaded:
        exits.fail("no cases there", exits.USAGE)
    failed = [result for result in run_cases(loaded) if not result.passed]
    for result in failed:
        print(exits.printable(str(result)))
    print(f"{len(loaded) - len(failed)} of {len(loaded)} cases pass")
    return exits.NO_VERDICT if failed else exits.OK


def _named(name: str) -> Policy:
    builtin = builtin_policies()
    if name in builtin:
        return builtin[name]
    if not name.endswith(_SUFFIXES) and not Path(name).is_file():
        known = ", ".join(builtin)
        exits.fail(f"no built-in policy and no file of that name; built in: {known}", exits.USAGE)
    try:
        return load_policy(name)
    except PolicyError as wrong:
        exits.fail("\n".join(map(str, wrong.problems)))


def _lines(policy: Policy) -> Iterator[str]:
    yield f"{policy.name} {policy.version}  ({policy.mode.value})  {policy.digest}"
    if policy.description:
        yield policy.description
    for direction in Direction:
        yield ""
        yield (
            f"{direction.value}: when it cannot judge {policy.on_unavailable(direction).value}, "
            f"when it cannot read a part {policy.on_unscannable(direction).value}"
        )
        yield from _rule_lines(policy, direction)
    if policy.cascade is not None:
        yield ""
        yield _cascade_line(policy.cascade)


def _cascade_line(cascade: Cascade) -> str:
    when = [f"from {score:g} of {code}" for code, score in cascade.categories.items()]
    spans = {way: f"from {low:g} to {high:g}" for way, (low, high) in cascade.bands.items()}
    alike = len(spans) == len(Direction) and len(set(spans.values())) == 1
    when[:0] = set(spans.values()) if alike else [f"{s} ({w.value})" for w, s in spans.items()]
    if cascade.images:
        when.append("wherever there is an image")
    return (
        f"second guard ({cascade.second}): decides {', '.join(when)}; "
        f"when it cannot in {cascade.timeout_s:g} s: {cascade.when_unable.value}"
    )


def _rule_lines(policy: Policy, direction: Direction) -> Iterator[str]:
    base = policy.rules(direction)
    width = max((len(rule.category.name) for rule in base), default=0)
    for rule in base:
        at = f"at {rule.threshold:g}" if rule.threshold <= 1 else "never"
        category = rule.category
        yield f"  {category.code:<4} {category.name:<{width}}  {rule.action.value:<5}  {at}"
    for tag in policy.languages:
        for rule, usual in zip(policy.rules(direction, tag), base, strict=True):
            if (rule.action, rule.threshold) != (usual.action, usual.threshold):
                yield (
                    f"  {rule.category.code:<4} in {tag}: {rule.action.value} at {rule.threshold:g}"
                )
