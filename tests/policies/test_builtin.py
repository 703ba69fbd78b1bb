"""The policies that come with the package are what their descriptions say."""

from guard_policies.assessment import Action, Direction
from guard_policies.loader import builtin_policies, parse_policy
from guard_policies.schema import Unscannable

HEAD = "name: a\nversion: 1\n"


def test_builtin_policies_are_the_three_that_are_documented() -> None:
    assert sorted(builtin_policies()) == ["default", "permissive", "strict"]
    assert all(name == policy.name for name, policy in builtin_policies().items())


def test_the_default_policy_says_nothing_but_defaults_in_its_rules() -> None:
    default, bare = builtin_policies()["default"], parse_policy(HEAD)
    for direction in Direction:
        assert default.rules(direction) == bare.rules(direction)
        assert default.on_unavailable(direction) is bare.on_unavailable(direction)
        assert default.on_unscannable(direction) is bare.on_unscannable(direction)
    assert default.stream == bare.stream
    assert default.refusal() == bare.refusal()


def test_the_strict_policy_is_nowhere_milder_on_responses_and_the_permissive_nowhere_severer() -> (
    None
):
    response = Direction.RESPONSE
    tables = [
        builtin_policies()[one].rules(response) for one in ("strict", "default", "permissive")
    ]
    for strict, default, permissive in zip(*tables, strict=True):
        assert strict.threshold <= default.threshold
        assert strict.action.severity >= default.action.severity >= permissive.action.severity


def test_no_policy_that_comes_with_the_package_passes_the_gravest_unjudged() -> None:
    for policy in builtin_policies().values():
        assert not policy.custom
        for direction in Direction:
            rules = {rule.category.code: rule for rule in policy.rules(direction)}
            assert all(rules[code].action is Action.BLOCK for code in ("S1", "S3", "S4", "S9"))
            assert policy.on_unavailable(direction) is not Action.ALLOW
            assert policy.on_unscannable(direction) is not Unscannable.ALLOW
