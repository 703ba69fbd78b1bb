"""What a policy says of its cascade, and when its second guard is asked."""

from __future__ import annotations

import json

import pytest

from guard_policies.assessment import Assessment, Direction
from guard_policies.cascade import Why, sent_up
from guard_policies.decide import Decision, decide
from guard_policies.loader import PolicyError, describe, parse_policy
from guard_policies.schema import Cascade, WhenUnable

HEAD = "name: a\nversion: '1'\n"
WHOLE = (
    "cascade: {second: llama-guard-3-11b, band: [0.2, 0.8], categories: {S4: 0.05, S14: 0}, "
    "images: false, when_unable: first, timeout_s: 1.5}"
)


def cascade_of(lines: str) -> Cascade:
    cascade = parse_policy(HEAD + lines).cascade
    assert cascade is not None
    return cascade


def decision(lines: str, **scores: float) -> Decision:
    policy = parse_policy(HEAD + lines)
    every = dict.fromkeys((one.code for one in policy.categories), 0.0) | scores
    return decide(policy, Assessment(sum(scores.values()), every), Direction.PROMPT)


def test_every_field_is_read_and_told() -> None:
    assert cascade_of(WHOLE) == Cascade(
        second="llama-guard-3-11b",
        bands=dict.fromkeys(Direction, (0.2, 0.8)),
        categories={"S4": 0.05, "S14": 0.0},
        images=False,
        when_unable=WhenUnable.FIRST,
        timeout_s=1.5,
    )
    told = json.loads(json.dumps(describe(parse_policy(HEAD + WHOLE))))["cascade"]
    assert told == {
        "second": "llama-guard-3-11b",
        "band": [0.2, 0.8],
        "categories": {"S4": 0.05, "S14": 0.0},
        "images": False,
        "when_unable": "first",
        "timeout_s": 1.5,
    }


def test_without_a_word_images_go_up_and_an_absent_second_is_an_error() -> None:
    assert cascade_of("cascade: {}") == Cascade(
        second="any", bands={}, categories={}, images=True, when_unable=WhenUnable.ERROR
    )
    assert parse_policy(HEAD).cascade is None


def test_every_field_is_meaning() -> None:
    texts = [
        "",
        "cascade: {}",
        WHOLE,
        WHOLE.replace("11b", "8b"),
        WHOLE.replace("0.8", "0.7"),
        WHOLE.replace("[0.2, 0.8]", "{prompt: [0.2, 0.8]}"),
        WHOLE.replace("[0.2, 0.8]", "{response: [0.2, 0.8]}"),
        WHOLE.replace("0.05", "0.06"),
        WHOLE.replace("images: false", "images: true"),
        WHOLE.replace("when_unable: first", "when_unable: error"),
        WHOLE.replace("1.5", "1.6"),
    ]
    assert len({parse_policy(HEAD + text).digest for text in texts}) == len(texts)


def test_the_second_guard_serves_the_same_policy_without_a_second_of_its_own() -> None:
    policy = parse_policy(HEAD + "engine: onnx\n" + WHOLE)
    own = policy.as_second()
    assert (own.engine, own.cascade, own.digest) == ("llama-guard-3-11b", None, policy.digest)
    assert own.tables == policy.tables
    alone = parse_policy(HEAD + "engine: onnx")
    assert alone.as_second() is alone


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("cascade: second", "cascade must be a mapping"),
        ("cascade: {bands: [0, 1]}", "did you mean 'band'?"),
        ("cascade: {band: 0.5}", "band must be a list"),
        ("cascade: {band: [0.5]}", "band must be two scores"),
        ("cascade: {band: [0.1, 0.2, 0.3]}", "band must be two scores"),
        ("cascade: {band: [0.8, 0.2]}", "the lower one first"),
        ("cascade: {band: {}}", "band must be two scores, or have some for prompt or response"),
        ("cascade: {band: {prompt: [0.8, 0.2]}}", "the lower one first"),
        ("cascade: {band: {prompts: [0.2, 0.8]}}", "did you mean 'prompt'?"),
        ("cascade: {band: [0, 1.1]}", "band must lie between 0 and 1"),
        ("cascade: {band: [a, 1]}", "band must be a number"),
        ("cascade: {categories: [S4]}", "categories of the cascade must be a mapping"),
        ("cascade: {categories: {S44: 0.1}}", "has no key 'S44'"),
        ("cascade: {categories: {S4: 2}}", "the score of S4 must lie between 0 and 1"),
        ("categories: {S4: off}\ncascade: {categories: {S4: 0.1}}", "S4 is off"),
        ("cascade: {images: maybe}", "images must be one of true, false"),
        ("cascade: {images: false}", "never asks the second guard"),
        ("cascade: {images: false, categories: {}}", "never asks the second guard"),
        ("cascade: {when_unable: allow}", "when_unable must be one of first, error"),
        ("cascade: {timeout_s: 0}", "timeout_s must lie between 0.01 and 300"),
        ("cascade: {second: a b}", "second 'a b' must be made of letters"),
    ],
)
def test_mistakes_are_told(lines: str, said: str) -> None:
    with pytest.raises(PolicyError) as wrong:
        parse_policy(HEAD + lines)
    assert len(wrong.value.problems) == 1
    assert said in str(wrong.value)


def test_one_window_takes_the_whole_conversation_up() -> None:
    sure, unsure, named = (
        decision(WHOLE.replace("S14: 0", "S14: 0.5"), **scores)
        for scores in ({"S1": 0.9}, {"S1": 0.5}, {"S4": 0.06})
    )
    terms = cascade_of(WHOLE.replace("S14: 0", "S14: 0.5"))
    assert sent_up(terms, [sure, sure], Direction.PROMPT) is None
    assert sent_up(terms, [sure, unsure], Direction.PROMPT) is Why.IN_BAND
    assert sent_up(terms, [unsure, named], Direction.PROMPT) is Why.CATEGORY


def test_a_score_of_zero_sends_everything_up() -> None:
    assert sent_up(cascade_of(WHOLE), [decision(WHOLE)], Direction.PROMPT) is Why.CATEGORY


def test_each_direction_may_have_a_band_of_its_own() -> None:
    both = "cascade: {band: {prompt: [0.2, 0.4], response: [0.4, 0.9]}}"
    unsure = decision(both, S1=0.5)
    assert sent_up(cascade_of(both), [unsure], Direction.PROMPT) is None
    assert sent_up(cascade_of(both), [unsure], Direction.RESPONSE) is Why.IN_BAND
    one = cascade_of("cascade: {band: {prompt: [0.2, 0.8]}}")
    assert sent_up(one, [unsure], Direction.PROMPT) is Why.IN_BAND
    assert sent_up(one, [unsure], Direction.RESPONSE) is None
    told = describe(parse_policy(HEAD + both))["cascade"]["band"]
    assert told == {"prompt": [0.2, 0.4], "response": [0.4, 0.9]}
    same = "cascade: {band: {prompt: [0.2, 0.8], response: [0.2, 0.8]}}"
    plain = "cascade: {band: [0.2, 0.8]}"
    assert parse_policy(HEAD + same).digest == parse_policy(HEAD + plain).digest
