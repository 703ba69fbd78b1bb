"""Fitted thresholds keep what they promise on their rows, and a policy takes them as they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from guard_policies.assessment import Direction
from guard_policies.loader import parse_policy
from guard_quantization.evaluation.evaluate import fit_temperature
from guard_quantization.evaluation.thresholds import (
    Aim,
    Fit,
    at_most_fpr,
    best_f1,
    fit_thresholds,
    policy_fragment,
)
from guard_service.evaluation.figures import Floats
from guard_service.evaluation.rows import LabelledRow
from tests.service.labelled import row

SCORES = st.lists(
    st.tuples(st.booleans(), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.3, 0.5, 0.9999]))),
    min_size=1,
    max_size=40,
)


@given(SCORES, st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_false_positive_rate_stays_within_its_aim(
    pairs: list[tuple[bool, float]], aim: float
) -> None:
    pairs = [(False, 0.25), *pairs]
    labels = np.array([label for label, _ in pairs])
    scores = np.array([score for _, score in pairs])
    at = at_most_fpr(labels, scores, aim)
    # No policy can have a threshold above 1, or one below 0.0001.
    wrong = ((scores >= at) & ~labels & (scores < 1)).sum() / (~labels).sum()
    assert wrong <= aim + 1e-9
    if at > 0.0001:
        lower = ((scores >= at - 2e-6) & ~labels).sum() / (~labels).sum()
        assert lower > aim or at >= 1.0


@given(SCORES)
@settings(max_examples=30, deadline=None)
def test_no_threshold_has_a_better_f1(pairs: list[tuple[bool, float]]) -> None:
    pairs = [(True, 0.75), (False, 0.25), *pairs]
    labels = np.array([label for label, _ in pairs])
    scores = np.maximum(np.array([score for _, score in pairs]), 0.001)
    at = best_f1(labels, scores)
    found = metrics.f1_score(labels, scores >= at)
    best = max(metrics.f1_score(labels, scores >= one) for one in scores)
    assert found == pytest.approx(best)


def test_temperature_recovers_what_was_applied() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    fitted = fit_temperature(labels, 1 / (1 + np.exp(-3 * logits)))
    assert fitted.bias == 0 and abs(fitted.scale - 1 / 3) < 0.03


def mixed(per_language: dict[str, int]) -> tuple[list[LabelledRow], Floats]:
    """Rows of both directions; German scores lie lower than English ones."""
    rng = np.random.default_rng(0)
    rows: list[LabelledRow] = []
    scores: list[float] = []
    for language, count in per_language.items():
        for n in range(count):
            way = (Direction.PROMPT, Direction.RESPONSE)[n % 2]
            unsafe = n // 2 % 2 == 0
            rows.append(row(len(rows), unsafe, language=language, direction=way))
            logit = rng.normal(2 if unsafe else -2, 1) - (1 if language == "de" else 0)
            scores.append(1 / (1 + np.exp(-logit)))
    return rows, np.array(scores)


def named(fits: Sequence[Fit], way: Direction, language: str) -> Fit:
    return next(one for one in fits if (one.direction, one.language) == (way, language))


def test_each_language_and_direction_has_its_own_and_few_rows_have_none() -> None:
    rows, scores = mixed({"en": 800, "de": 800, "th": 40, "no": 400})
    fits = fit_thresholds(rows, scores, Aim())
    prompt = {tag: named(fits, Direction.PROMPT, tag) for tag in ("", "en", "de", "th")}
    assert prompt["th"].threshold is None and prompt["th"].safe == 10
    assert prompt["de"].threshold is not None and prompt["en"].threshold is not None
    assert prompt["de"].threshold < prompt["en"].threshold - 0.1
    assert prompt["de"].f1 > 0.9 and prompt[""].safe == 510


def test_fragment_is_a_policy_that_has_these_thresholds() -> None:
    rows, scores = mixed({"en": 800, "de": 800, "th": 40, "no": 400})
    aim = Aim(fpr=0.02)
    fits = fit_thresholds(rows, scores, aim)
    text = policy_fragment(fits, aim)
    policy = parse_policy('name: fitted\nversion: "1"\n' + text)
    for fit in fits:
        expected = fit.threshold
        if expected is None:
            expected = named(fits, fit.direction, "").threshold
        rules = policy.rules(fit.direction, fit.language)
        assert {rule.threshold for rule in rules} == {expected}
        assert fit.threshold is None or fit.fpr <= 0.02
    assert policy.languages == ("de", "en", "no")
    assert "# prompt 'th': 10 safe, 10 unsafe: too few to fit" in text
    assert "a false positive rate of at most 0.02" in text


def test_language_that_is_no_plain_word_cannot_break_the_fragment() -> None:
    rows, scores = mixed({"en\nname: evil": 400})
    text = policy_fragment(fit_thresholds(rows, scores, Aim()), Aim())
    assert "\nname" not in text
