"""Limits on figures: what they say, what breaks them, what nobody can say."""

from __future__ import annotations

from typing import Any

import pytest

from guard_service.evaluation.gate import (
    LimitsError,
    read_limits,
    read_report,
    violations,
)


def report(**all_rows: float | None) -> dict[str, Any]:
    figures = {"auroc": 0.9, "f1": 0.8, "fpr": 0.1, "ece": 0.05, **all_rows}
    return {
        "format": "guard-evaluation/1",
        "data": {"rows": 10, "digest": "sha256:1"},
        "unjudged": {"rows": 0, "share": 0.0},
        "all": figures,
        "by": {
            "language": {"de": {"f1": 0.5}, "en": {"f1": 0.9}, "th": {"f1": None}},
            "file": {"a": {"auroc": None}},
        },
        "over_refusal": {"fpr": 0.2},
        "categories": {"accuracy": 0.7, "macro_f1": None},
        "by_category": {"S1": {"recall": 0.6}},
    }


def broken(
    limits: str,
    found: dict[str, Any] | None = None,
    reference: dict[str, Any] | None = None,
    agreement: float | None = None,
) -> list[str]:
    found = report() if found is None else found
    return [str(one) for one in violations(read_limits(limits), found, reference, agreement)]


def test_limits_that_hold_break_nothing() -> None:
    limits = """
min: {auroc: 0.9, f1: 0.8}
max: {fpr: 0.1}
over_refusal: {max: {fpr: 0.2}}
categories: {min: {accuracy: 0.7}}
by:
  language: {de: {min: {f1: 0.5}}, "*": {min: {f1: 0.9}}}
  category: {S1: {min: {recall: 0.6}}}
"""
    assert broken(limits) == []


def test_every_broken_limit_is_listed_with_place_value_and_bound() -> None:
    limits = """
min: {auroc: 0.95}
max: {fpr: 0.05, ece: 0.01}
over_refusal: {max: {fpr: 0.1}}
by: {language: {"*": {min: {f1: 0.95}}}, category: {S1: {min: {recall: 0.9}}}}
"""
    assert broken(limits) == [
        "auroc: 0.9000, must be at least 0.95",
        "fpr: 0.1000, must be at most 0.05",
        "ece: 0.0500, must be at most 0.01",
        "over_refusal fpr: 0.2000, must be at most 0.1",
        "language de f1: 0.5000, must be at least 0.95",
        "language en f1: 0.9000, must be at least 0.95",
        "category S1 recall: 0.6000, must be at least 0.9",
    ]


def test_limit_on_what_is_not_there_or_not_defined_is_broken() -> None:
    limits = """
categories: {min: {macro_f1: 0.1}}
by:
  language: {th: {min: {f1: 0.1}}, xx: {min: {f1: 0.1}}}
  file: {"*": {min: {auroc: 0.1}}}
"""
    assert broken(limits) == [
        "categories macro_f1: is not defined for these rows",
        "language th f1: is not defined for these rows",
        "language xx f1: no such language xx",
        "file * auroc: is defined in no group; nothing was checked",
    ]


def test_rows_without_verdict_break_a_gate_that_does_not_allow_them() -> None:
    found = {**report(), "unjudged": {"rows": 3, "share": 0.03}}
    assert broken("min: {f1: 0.1}", found) == [
        "unjudged: 3 rows (3.00%) have no verdict; at most 0.00%"
    ]
    assert broken("unjudged: 0.03", found) == []


def test_worse_than_the_reference_goes_each_figure_s_own_way() -> None:
    limits = "worse: {auroc: 0.01, fpr: 0.01}"
    assert broken(limits, report(auroc=0.89, fpr=0.11), report()) == []
    assert broken(limits, report(auroc=0.99, fpr=0.01), report()) == []
    assert broken(limits, report(auroc=0.88, fpr=0.12), report()) == [
        "auroc: 0.8800 after 0.9000, may be worse than the reference by at most 0.01",
        "fpr: 0.1200 after 0.1000, may be worse than the reference by at most 0.01",
    ]


def test_reference_that_is_missing_or_of_other_rows_is_no_reference() -> None:
    limits = "worse: {f1: 0.5}"
    assert broken(limits) == ["worse: there is no reference report to compare with"]
    other = {**report(), "data": {"rows": 10, "digest": "sha256:2"}}
    assert broken(limits, report(), other) == ["worse: the reference is a report on other rows"]
    assert broken(limits, report(), report(f1=None)) == ["f1: the reference has no such figure"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("min: {aurocc: 0.9}", "limits.yaml:1:7: min has no key 'aurocc'; did you mean 'auroc'?"),
        ("mni: {f1: 1}", "did you mean 'min'?"),
        ("min: {f1: high}", "min.f1 must be a number"),
        ("max: {fpr: 5}", "must lie between 0 and 1"),
        ("by: {lang: {de: {min: {f1: 1}}}}", "did you mean 'language'?"),
        ("by: {language: {de: {least: {f1: 1}}}}", "language.de has no key 'least'"),
        ("by: {category: {S1: {min: {ece: 1}}}}", "min has no key 'ece'"),
        ("{}", "has no limit"),
        ("[]", "must be a mapping"),
        ("min: &a {f1: 1}\nmax: *a", "aliases"),
    ],
)
def test_mistake_in_a_limits_file_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(LimitsError) as refused:
        read_limits(text, "limits.yaml")
    assert said in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": "x"}', b"\xff", b"[" * 99_999])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"'r.json' is not a report"):
        read_report(data, "r.json")


def test_agreement_is_held_against_its_limit_and_missing_is_broken() -> None:
    assert broken("agreement: 0.98", agreement=0.98) == []
    said = "agreement: 0.9700 of the verdicts are the reference's, must be at least 0.98"
    assert broken("agreement: 0.98", agreement=0.97) == [said]
    assert broken("agreement: 0.98", agreement=float("nan")) != []
    missing = ["agreement: there is no reference that judged the rows"]
    assert broken("agreement: 0.98") == missing


def test_name_of_a_group_cannot_steer_the_terminal_that_shows_it() -> None:
    found = report()
    found["by"]["language"] = {"\x1b[2J": {"f1": 0.1}}
    (said,) = broken("by: {language: {'*': {min: {f1: 0.9}}}}", found)
    assert "\x1b" not in said and "f1: 0.1000" in said
