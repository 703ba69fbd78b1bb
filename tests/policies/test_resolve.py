"""Which setting holds, what a digest covers, what a description says."""

import json
from itertools import product

import pytest

from guard_policies.assessment import Action, Direction
from guard_policies.loader import builtin_policies, describe, parse_policy
from guard_policies.schema import Policy, Unscannable, widening

HEAD = "name: a\nversion: 1\n"
PROMPT, RESPONSE = Direction.PROMPT, Direction.RESPONSE


def threshold(policy: Policy, code: str, direction: Direction, language: str = "") -> float:
    rules = policy.rules(direction, language)
    return next(rule.threshold for rule in rules if rule.category.code == code)


def test_the_most_particular_setting_holds() -> None:
    """Every subset of the eight places that may speak: the first in the order of rank wins."""
    places = [  # most particular first
        ("languages", "de", "categories", "S1", "prompt"),
        ("languages", "de", "categories", "S1"),
        ("categories", "S1", "prompt"),
        ("categories", "S1"),
        ("languages", "de", "prompt"),
        ("languages", "de"),
        ("prompt",),
        (),
    ]
    for speaking in product((False, True), repeat=len(places)):
        tree: dict[str, object] = {"name": "a", "version": "1", "languages": {"de": {}}}
        for rank, (place, speaks) in enumerate(zip(places, speaking, strict=True)):
            node: dict[str, object] = tree
            for key in place if speaks else ():
                node = node.setdefault(key, {})  # type: ignore[assignment]
            if speaks:
                node["threshold"] = (rank + 1) / 10
        expected = (speaking.index(True) + 1) / 10 if any(speaking) else 0.5
        policy = parse_policy(json.dumps(tree))  # JSON is YAML
        assert threshold(policy, "S1", PROMPT, "de") == expected, tree


def test_a_region_takes_from_its_language_what_it_does_not_say() -> None:
    policy = parse_policy(
        HEAD
        + "languages:\n  pt-BR: {threshold: 0.7}\n"
        + "  pt: {threshold: 0.6, categories: {S1: {threshold: 0.3, action: flag}}}\n"
    )
    assert threshold(policy, "S2", PROMPT, "pt-BR") == 0.7
    assert threshold(policy, "S1", PROMPT, "pt-BR") == 0.3
    assert threshold(policy, "S2", PROMPT, "pt-PT") == 0.6
    assert threshold(policy, "S2", PROMPT, "pt-br-x-private") == 0.7
    assert threshold(policy, "S2", PROMPT, "fr") == 0.5
    assert policy.rules(PROMPT, "pt_BR") == policy.rules(PROMPT, "PT-br")


@pytest.mark.parametrize(
    ("tag", "ranges"),
    [
        ("", [""]),
        ("de", ["de", ""]),
        ("zh-Hant-TW", ["zh-hant-tw", "zh-hant", "zh", ""]),
        ("zh-x-a", ["zh-x-a", "zh", ""]),
        ("-", ["-", ""]),
        ("a" * 36, [""]),
        ("a-" * 100_000, [""]),
    ],
)
def test_a_language_widens_as_rfc_4647_says(tag: str, ranges: list[str]) -> None:
    assert list(widening(tag)) == ranges


def test_off_in_one_direction_leaves_the_other() -> None:
    policy = parse_policy(HEAD + "categories: {S6: {prompt: off}}")
    assert "S6" in [one.code for one in policy.categories]
    assert "S6" not in [one.code for one in policy.judged(PROMPT)]
    assert "S6" in [one.code for one in policy.judged(RESPONSE)]


def test_a_direction_may_be_off_altogether() -> None:
    policy = parse_policy(HEAD + "prompt: off")
    assert policy.rules(PROMPT) == () == policy.judged(PROMPT)
    assert len(policy.rules(RESPONSE)) == 14
    assert policy.on_unavailable(PROMPT) is Action.ALLOW
    assert policy.on_unscannable(PROMPT) is Unscannable.ALLOW


def test_a_policy_may_judge_only_what_it_lists() -> None:
    policy = parse_policy(HEAD + "action: off\ncategories: {S4: block, S10: {threshold: 0.1}}")
    assert [one.code for one in policy.categories] == ["S4"]


def test_judged_categories_are_the_same_in_every_language() -> None:
    policy = parse_policy(HEAD + "categories: {S6: off}\nlanguages: {de: {action: flag}}")
    for direction in Direction:
        codes = [rule.category for rule in policy.rules(direction, "de")]
        assert codes == [rule.category for rule in policy.rules(direction)]


def test_the_severest_wish_counts_when_nothing_could_be_judged() -> None:
    policy = parse_policy(
        HEAD
        + "on_unavailable: allow\non_unscannable: allow\n"
        + "categories:\n"
        + "  S4: {on_unavailable: flag, response: {on_unavailable: block}}\n"
        + "  S5: {on_unscannable: block, prompt: {on_unscannable: error}}\n"
        + "  S6: {action: off, on_unavailable: block}\n"
    )
    assert policy.on_unavailable(PROMPT) is Action.FLAG
    assert policy.on_unavailable(RESPONSE) is Action.BLOCK
    assert policy.on_unscannable(PROMPT) is Unscannable.ERROR
    assert policy.on_unscannable(RESPONSE) is Unscannable.BLOCK


def test_shadow_lets_pass_what_could_not_be_judged() -> None:
    policy = parse_policy(HEAD + "mode: shadow\non_unavailable: block")
    assert policy.on_unavailable(PROMPT) is Action.ALLOW


def test_a_refusal_is_in_the_nearest_language_there_is() -> None:
    policy = parse_policy(HEAD + "refusal: {de: Nein, pt-BR: Não}")
    assert policy.refusal("de-AT") == "Nein"
    assert policy.refusal("pt-br") == "Não"
    assert policy.refusal("pt") == policy.refusal() == "I can't help with that."
    assert parse_policy(HEAD + "refusal: Ask us.").refusal("de") == "Ask us."


MEANING = """
name: a
version: "1"
categories:
  S1: {action: flag, threshold: 0.25}
  S2: off
languages:
  de: {threshold: 0.6}
"""
SAME = [
    MEANING.replace("flag, threshold: 0.25", "flag, threshold: 2.5e-1"),
    "# a comment\n" + MEANING.replace('"1"', "1   # another"),
    MEANING.replace("S2: off", "S2: {prompt: off, response: {action: off}}"),
    MEANING + "mode: enforce\nthreshold: 0.50\nengine: any\naction: block\n",
    "version: 1\nlanguages: {DE: {threshold: 0.6}}\n"
    "categories: {S2: off, S1: {threshold: 0.25, action: flag}}\nname: a",
]
OTHER = [
    MEANING.replace("0.25", "0.26"),
    MEANING.replace("0.6", "0.61"),
    MEANING.replace("S2: off", "S2: allow"),
    MEANING.replace('"1"', '"2"'),
    MEANING + "mode: shadow",
    MEANING + "prompt: {on_unavailable: flag}",
    MEANING + "refusal: No.",
    MEANING + "engine: onnx",
    MEANING + "stream: {check_every_chars: 10}",
    MEANING + "stream: {first_check_chars: 10}",
    MEANING + "stream: {sentence_ends: true}",
    MEANING + "stream: {hold_back_chars: 10}",
    MEANING.replace("S2: off", "S2: off\n  S5: {description: Own words}"),
]


@pytest.mark.parametrize("text", SAME)
def test_the_digest_does_not_change_with_the_spelling(text: str) -> None:
    assert parse_policy(text).digest == parse_policy(MEANING).digest


def test_the_digest_changes_with_the_meaning() -> None:
    digests = {parse_policy(text).digest for text in [MEANING, *OTHER]}
    assert len(digests) == 1 + len(OTHER)


def test_the_order_of_own_categories_is_meaning() -> None:
    own = [f"  S{n}: {{name: N, description: D}}\n" for n in (15, 16)]
    one, other = (HEAD + "categories:\n" + "".join(part) for part in (own, own[::-1]))
    assert parse_policy(one).digest != parse_policy(other).digest


def test_the_digest_of_a_given_policy_stays_the_same_between_releases() -> None:
    """A change here makes every cached verdict and every recorded digest stale: mean it."""
    assert parse_policy(MEANING).digest == (
        "sha256:2f8c85d2875b163f363d404ced9caaada3b225f3a00503dae0d9fa8622fb2be9"
    )


def test_a_description_is_plain_data_and_complete() -> None:
    for policy in builtin_policies().values():
        told = json.loads(json.dumps(describe(policy)))
        assert told["digest"] == policy.digest
        assert len(told["rules"]["prompt"][""]) == len(policy.rules(PROMPT))
        assert [one["code"] for one in told["categories"]] == [
            one.code for one in policy.categories
        ]
