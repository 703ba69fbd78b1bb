"""The decision tables hold, and their runner tells where one does not."""

from pathlib import Path

import pytest

from guard_policies.cases import CaseResult, load_cases, run_cases
from guard_policies.loader import PolicyError, builtin_policies, parse_policy

CASES = Path(__file__).parents[2] / "policies" / "cases"
RESULTS = run_cases(load_cases([CASES]))


@pytest.mark.parametrize(
    "result", RESULTS, ids=lambda one: f"{one.case.policy.name}: {one.case.name}"
)
def test_the_case_holds(result: CaseResult) -> None:
    assert result.passed, str(result)


def test_every_builtin_policy_has_a_table() -> None:
    assert {one.case.policy.name for one in RESULTS} >= set(builtin_policies())


def write(folder: Path, text: str) -> Path:
    path = folder / "cases.yaml"
    path.write_text(text)
    return path


def test_a_case_that_fails_is_told_with_its_place_and_every_difference(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "policy: default\ncases:\n"
        "  - {name: fine, expect: {action: allow}}\n"
        "  - name: wrong\n    scores: {S1: 0.6}\n"
        "    expect: {action: allow, fired: [], joint: false}\n",
    )
    first, second = run_cases(load_cases([path]))
    assert first.passed
    assert str(second) == (
        f"{path}:4:5: wrong: action is block, expected allow; fired is [S1], expected []"
    )


def test_a_case_without_a_decision_fails_instead_of_stopping_the_run(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "policy: default\ncases:\n  - {name: a, unscannable: true, expect: {action: block}}\n",
    )
    (result,) = run_cases(load_cases([path]))
    assert result.differences == (
        "the policy makes an unscannable part an error; it has no decision",
    )


def test_own_policies_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\nversion: 1\nthreshold: 0.9\n")
    rows = "\ncases:\n  - {name: a, scores: {S1: 0.8}, expect: {action: allow}}\n"
    own = parse_policy((tmp_path / "own.yaml").read_text())
    for name, known in (("own.yaml", {}), ("own", {"own": own})):
        cases = load_cases([write(tmp_path, f"policy: {name}{rows}")], known)
        assert [one.passed for one in run_cases(cases)] == [True]


def test_mistakes_in_cases_are_told_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "policy: default\ncases:\n"
        "  - {name: a, score: {S1: 1}, expect: {}}\n"
        "  - {direction: promt, scores: {S15: 1, S1: 2}, expect: {acton: block, fired: [S99]}}\n",
    )
    with pytest.raises(PolicyError) as caught:
        load_cases([path])
    assert [f"{one.line}:{one.column}" for one in caught.value.problems] == [
        "3:15",  # score
        "3:39",  # expect states nothing
        "4:5",  # no name
        "4:17",  # promt
        "4:33",  # S15
        "4:45",  # S1: 2
        "4:58",  # acton
        "4:80",  # S99
    ]


@pytest.mark.parametrize(
    "text", ["cases: []", "policy: nope\ncases: []", "policy: x.yaml\ncases: []"]
)
def test_a_table_without_its_policy_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError):
        load_cases([write(tmp_path, text)])
