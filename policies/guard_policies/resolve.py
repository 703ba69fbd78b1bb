"""From what a policy's author said to one rule per category, direction and language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar

from guard_policies.assessment import Action, Direction
from guard_policies.positions import Reader
from guard_policies.schema import (
    DEFAULT_REFUSAL,
    DEFAULT_THRESHOLD,
    Cascade,
    Policy,
    Rule,
    Stream,
    Unscannable,
    widening,
)
from guard_policies.syntax import OFF, Draft, LanguageDraft, Settings
from guard_policies.taxonomy import Category

T = TypeVar("T")


def resolve(reader: Reader, draft: Draft) -> Policy:
    """The policy that a draft means. Reports contradictions; the result then is of no use."""
    judged = {direction: _judged(draft, direction) for direction in Direction}
    either = tuple(one for one in draft.wording if any(one in some for some in judged.values()))
    if not either:
        reader.report(draft.name_node, "the policy judges nothing: every category is off")
    codes = {category.code for category in either}
    _check_languages(reader, draft, codes)
    _check_cascade(reader, draft, codes)
    policy = Policy(
        name=draft.name,
        version=draft.version,
        description=draft.description,
        digest="",
        mode=draft.mode,
        engine=draft.engine,
        categories=either,
        stream=draft.stream,
        tables={
            (direction, tag): tuple(_rule(draft, one, direction, tag) for one in judged[direction])
            for direction in Direction
            for tag in ("", *draft.languages)
        },
        unavailable={one: _unavailable(draft, one, judged[one]) for one in Direction},
        unscannable={one: _unscannable(draft, one, judged[one]) for one in Direction},
        refusals={"": DEFAULT_REFUSAL} | dict(draft.refusals),
        cascade=draft.cascade.cascade if draft.cascade else None,
        image_uris=draft.image_uris,
        candidate=draft.candidate,
    )
    return replace(policy, digest=_digest(policy))


def describe(policy: Policy) -> dict[str, Any]:
    """The resolved policy as plain data (JSON-ready), for people and for its digest.

    `rules` holds for each direction and language ("" is the base) the rules in order. `cascade` and
    `candidate` are None without one.
    """
    return {
        "name": policy.name,
        "version": policy.version,
        "digest": policy.digest,
        "description": policy.description,
        "mode": policy.mode.value,
        "engine": policy.engine,
        "custom": policy.custom,
        "categories": [
            {
                "code": one.code,
                "name": one.name,
                "description": one.description,
                "prompt_name": one.prompt_name,
            }
            for one in policy.categories
        ],
        "rules": {one.value: _rules_by_language(policy, one) for one in Direction},
        "on_unavailable": {one.value: policy.on_unavailable(one).value for one in Direction},
        "on_unscannable": {one.value: policy.on_unscannable(one).value for one in Direction},
        "stream": asdict(policy.stream),
        "cascade": _described(policy.cascade) if policy.cascade else None,
        "image_uris": {
            "hosts": list(policy.image_uris.hosts),
            "ports": list(policy.image_uris.ports),
            "schemes": list(policy.image_uris.schemes),
        },
        "candidate": {"for": policy.candidate.of, "share": policy.candidate.share}
        if policy.candidate
        else None,
        "refusal": dict(policy.refusals),
    }


def _described(cascade: Cascade) -> dict[str, Any]:
    bands = {one.value: list(band) for one in Direction if (band := cascade.bands.get(one))}
    alike = len(bands) == len(Direction) and len({tuple(band) for band in bands.values()}) == 1
    return {
        "second": cascade.second,
        "band": next(iter(bands.values())) if alike else bands or None,
        "categories": dict(cascade.categories),
        "images": cascade.images,
        "when_unable": cascade.when_unable.value,
        "timeout_s": cascade.timeout_s,
    }


def _rules_by_language(policy: Policy, direction: Direction) -> dict[str, list[dict[str, Any]]]:
    return {
        tag: [
            {
                "code": rule.category.code,
                "action": rule.action.value,
                "threshold": rule.threshold,
            }
            for rule in policy.rules(direction, tag)
        ]
        for tag in ("", *policy.languages)
    }


def _digest(policy: Policy) -> str:
    """Of the description, less what no verdict depends on: our own words on known categories."""
    meaning = describe(policy)
    del meaning["digest"], meaning["candidate"]
    if policy.cascade is None:
        del meaning["cascade"]  # as it was before there were cascades
    if not policy.image_uris.hosts:
        del meaning["image_uris"]  # nor images
    usual = asdict(Stream())
    for key in ("first_check_chars", "sentence_ends", "hold_back_chars"):
        if meaning["stream"][key] == usual[key]:
            del meaning["stream"][key]  # as it was before there were these
    for category in meaning["categories"]:
        if category["prompt_name"]:
            del category["description"]
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _base(draft: Draft, code: str, direction: Direction) -> Iterator[Settings]:
    """Where the policy speaks of a category, languages aside: the most particular place first."""
    if code in draft.categories:
        yield from draft.categories[code].chain(direction)
    yield from draft.base.chain(direction)


def _places(draft: Draft, code: str, direction: Direction, tag: str) -> Iterator[Settings]:
    """As `_base`, with languages: what is said of the category goes before what is said of all."""
    languages: list[LanguageDraft] = [
        draft.languages[wider] for wider in widening(tag) if wider in draft.languages
    ]
    for language in languages:
        if code in language.categories:
            yield from language.categories[code].chain(direction)
    if code in draft.categories:
        yield from draft.categories[code].chain(direction)
    for language in languages:
        yield from language.whole.chain(direction)
    yield from draft.base.chain(direction)


def _first(places: Iterator[Settings], pick: Callable[[Settings], T | None], default: T) -> T:
    found = (pick(place) for place in places)
    return next((value for value in found if value is not None), default)


def _judged(draft: Draft, direction: Direction) -> tuple[Category, ...]:
    block = Action.BLOCK.value
    return tuple(
        one
        for one in draft.wording
        if _first(_base(draft, one.code, direction), lambda place: place.action, block) != OFF
    )


def _rule(draft: Draft, category: Category, direction: Direction, tag: str) -> Rule:
    def places() -> Iterator[Settings]:
        return _places(draft, category.code, direction, tag)

    action = _first(places(), lambda place: place.action, Action.BLOCK.value)
    threshold = _first(places(), lambda place: place.threshold, DEFAULT_THRESHOLD)
    return Rule(category, Action(action), threshold)


def _unavailable(draft: Draft, direction: Direction, judged: tuple[Category, ...]) -> Action:
    wanted = (
        _first(_base(draft, one.code, direction), lambda place: place.on_unavailable, Action.BLOCK)
        for one in judged
    )
    return max(wanted, key=lambda action: action.severity, default=Action.ALLOW)


def _unscannable(draft: Draft, direction: Direction, judged: tuple[Category, ...]) -> Unscannable:
    error = Unscannable.ERROR
    wanted = (
        _first(_base(draft, one.code, direction), lambda place: place.on_unscannable, error)
        for one in judged
    )
    return max(wanted, key=lambda action: action.severity, default=Unscannable.ALLOW)


def _check_cascade(reader: Reader, draft: Draft, judged: set[str]) -> None:
    for code, key in (draft.cascade.keys if draft.cascade else {}).items():
        if code not in judged:
            reader.report(key, f"{code} is off, so no guard is asked about it")


def _check_languages(reader: Reader, draft: Draft, judged: set[str]) -> None:
    for tag, language in draft.languages.items():
        for code, key in language.keys.items():
            if code not in judged:
                reader.report(key, f"{code} is off, so it cannot have a rule in {tag!r}")
