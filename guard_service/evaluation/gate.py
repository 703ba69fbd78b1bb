"""Limits on a report's figures, from YAML; a build fails while any is broken.

    min: {auroc: 0.9}                    # of all rows
    max: {fpr: 0.05, ece: 0.1}
    worse: {auroc: 0.01, fpr: 0.01}      # than the reference report, at most by so much
    agreement: 0.98                      # share of verdicts as the reference's, where it judges too
    unjudged: 0.001                      # share of rows without verdict; 0 when left out
    over_refusal: {max: {fpr: 0.1}}
    categories: {min: {accuracy: 0.6, macro_f1: 0.5}}
    by:
      language:
        de: {min: {f1: 0.8}}
        "*": {min: {auroc: 0.7}}         # every other language in which the figure is defined

A limit on what is not there, or on a figure that is not defined, is broken: nobody can say that it
holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yaml.nodes import Node

from guard_policies.positions import PolicyError, Reader, quote
from guard_service.evaluation.figures import LOWER_IS_BETTER, NAMES
from guard_service.evaluation.report import DIMENSIONS
from guard_service.terminal import printable

_SIDES = ("min", "max", "worse")
_EVERY = "*"
_NAMING = ("accuracy", "macro_f1")
_BY_CATEGORY = ("recall", "auroc", "named_f1")
_WORDS = {"min": "at least", "max": "at most", "worse": "worse than the reference by at most"}

LimitsError = PolicyError  # every mistake of the file, with line and column


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound. `place` leads to the figures: () all rows, ("language", "de"), ...; "*": each."""

    place: tuple[str, ...]
    side: str  # "min", "max" or "worse"
    figure: str
    bound: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What a limits file says."""

    limits: tuple[Limit, ...] = ()
    unjudged: float = 0.0
    agreement: float = 0.0

    @property
    def need_reference(self) -> bool:
        """Whether a limit compares with a reference report."""
        return any(limit.side == "worse" for limit in self.limits)

    @property
    def count(self) -> int:
        """How many limits there are besides that on rows without verdict."""
        return len(self.limits) + (self.agreement > 0)


@dataclass(frozen=True, slots=True)
class Violation:
    """A limit that does not hold, or of which nobody can say that it does."""

    place: tuple[str, ...]
    figure: str
    said: str = field(compare=False)

    def __str__(self) -> str:
        return printable(f"{' '.join((*self.place, self.figure))}: {self.said}")


def read_limits(data: bytes | str, file: str = "<limits>") -> Limits:
    """The limits in a YAML text. Raises LimitsError with every mistake in it."""
    reader = Reader(file)
    root = reader.compose(data)
    keys = (*_SIDES, "agreement", "unjudged", "over_refusal", "categories", "by")
    table = reader.table(root, "the file", keys)
    limits = [*_sides(reader, root, (), NAMES, extra=keys)]
    for name, figures in (("over_refusal", ("fpr",)), ("categories", _NAMING)):
        if name in table:
            limits += _sides(reader, table[name].value, (name,), figures)
    if "by" in table:
        limits += _groups(reader, table["by"].value)
    shares = {
        name: reader.number(table[name].value, name, 0, 1) or 0.0
        for name in ("unjudged", "agreement")
        if name in table
    }
    if not limits and not shares:
        reader.report(root, "has no limit")
    reader.check()
    return Limits(tuple(limits), **shares)


def _groups(reader: Reader, node: Node) -> Iterator[Limit]:
    for dimension, entry in reader.table(node, "by", (*DIMENSIONS, "category")).items():
        figures = _BY_CATEGORY if dimension == "category" else NAMES
        for group, inner in reader.table(entry.value, f"by.{dimension}", None).items():
            yield from _sides(reader, inner.value, (dimension, group), figures)


def _sides(
    reader: Reader,
    node: Node,
    place: tuple[str, ...],
    figures: Sequence[str],
    extra: Sequence[str] = _SIDES,
) -> Iterator[Limit]:
    what = ".".join(place) or "the file"
    for side, entry in reader.table(node, what, extra).items():
        if side in _SIDES:
            for figure, inner in reader.table(entry.value, side, figures).items():
                bound = reader.number(inner.value, f"{side}.{figure}", 0, 1)
                yield Limit(place, side, figure, bound or 0.0)


def violations(
    limits: Limits,
    report: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    agreement: float | None = None,
) -> list[Violation]:
    """Every limit that a report does not keep, in the order of the limits.

    `agreement` is the share of rows on which the reference's verdict was the same.
    """
    found = [*_shares(limits, report["unjudged"], agreement)]
    if limits.need_reference:
        if reference is None:
            return [*found, Violation((), "worse", "there is no reference report to compare with")]
        if reference["data"] != report["data"]:
            found.append(Violation((), "worse", "the reference is a report on other rows"))
    named = {limit.place for limit in limits.limits}
    for limit in limits.limits:
        found += _broken(limit, named, report, reference or {})
    return found


def _shares(
    limits: Limits, unjudged: Mapping[str, Any], agreement: float | None
) -> Iterator[Violation]:
    if unjudged["share"] > limits.unjudged:
        said = f"{unjudged['rows']} rows ({unjudged['share']:.2%}) have no verdict"
        yield Violation((), "unjudged", f"{said}; at most {limits.unjudged:.2%}")
    if limits.agreement and agreement is None:
        yield Violation((), "agreement", "there is no reference that judged the rows")
    elif limits.agreement and agreement is not None and not agreement >= limits.agreement:
        said = f"{agreement:.4f} of the verdicts are the reference's"
        yield Violation((), "agreement", f"{said}, must be at least {limits.agreement:g}")


def _broken(
    limit: Limit,
    named: set[tuple[str, ...]],
    report: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> Iterator[Violation]:
    if limit.place[-1:] != (_EVERY,):
        said = _said(limit, limit.place, report, reference)
        if said:
            yield Violation(limit.place, limit.figure, said)
        return
    dimension, checked = limit.place[0], 0
    for group in _at(report, (dimension,)) or {}:
        place = (dimension, group)
        if place in named or _value(report, place, limit.figure) is None:
            continue
        checked += 1
        if said := _said(limit, place, report, reference):
            yield Violation(place, limit.figure, said)
    if not checked:
        yield Violation(limit.place, limit.figure, "is defined in no group; nothing was checked")


def _said(
    limit: Limit,
    place: tuple[str, ...],
    report: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> str:
    """What is wrong; empty when the limit holds."""
    value = _value(report, place, limit.figure)
    if value is None:
        there = _at(report, place)
        return "is not defined for these rows" if there else f"no such {' '.join(place)}"
    if limit.side != "worse":
        held = value >= limit.bound if limit.side == "min" else value <= limit.bound
        return "" if held else f"{value:.4f}, must be {_WORDS[limit.side]} {limit.bound:g}"
    before = _value(reference, place, limit.figure)
    if before is None:
        return "the reference has no such figure"
    worse = value - before if limit.figure in LOWER_IS_BETTER else before - value
    if worse <= limit.bound + 1e-12:
        return ""
    return f"{value:.4f} after {before:.4f}, may be {_WORDS['worse']} {limit.bound:g}"


def _at(report: Mapping[str, Any], place: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The figures, or the groups of a dimension, that a place leads to."""
    if not place:
        whole: Mapping[str, Any] | None = report.get("all")
        return whole
    head, *rest = place
    if head in ("over_refusal", "categories"):
        found = report.get(head)
    elif head == "category":
        found = report.get("by_category")
    else:
        found = (report.get("by") or {}).get(head)
    for name in rest:
        found = (found or {}).get(name)
    return found


def _value(report: Mapping[str, Any], place: tuple[str, ...], figure: str) -> float | None:
    value = (_at(report, place) or {}).get(figure)
    return value if isinstance(value, int | float) else None


def read_report(data: bytes, file: str) -> dict[str, Any]:
    """A report from its JSON. Raises ValueError for anything else."""
    import json

    try:
        report = json.loads(data)
        if not isinstance(report, dict) or report["format"] != "guard-evaluation/1":
            raise ValueError
        if not isinstance(report["data"], dict) or not isinstance(report["all"], dict):
            raise ValueError
        float(report["unjudged"]["share"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{quote(file)} is not a report of guardctl eval") from None
    return report
