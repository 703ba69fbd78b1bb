"""What policy files may say, and what each mistake is answered with."""

import os
import time
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_policies.assessment import Action, Direction
from guard_policies.loader import (
    PolicyError,
    load_policies,
    load_policy,
    parse_policy,
)
from guard_policies.schema import Mode, Unscannable

HEAD = "name: a\nversion: 1\n"  # so that a test's own lines begin with line 3


def mistakes(text: str | bytes) -> list[str]:
    """Position and message of every mistake."""
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "f")
    return [str(problem) for problem in caught.value.problems]


MISTAKES = [
    ("unknown key", "treshold: 0.4", ["f:3:1: a policy has no key 'treshold'; did you mean 'thr"]),
    ("no idea", "qqq: 1", ["f:3:1: a policy has no key 'qqq'"]),
    ("letter case", "Mode: shadow", ["f:3:1: a policy has no key 'Mode'; did you mean 'mode'?"]),
    ("twice", "mode: shadow\nmode: enforce", ["f:4:1: 'mode' is given twice; first in line 3"]),
    ("a word", "mode: shadwo", ["f:3:7: mode must be one of enforce, shadow, not 'shadwo'; did"]),
    (
        "yaml's no",
        "action: no",
        ["f:3:9: action must be one of off, allow, flag, block, not 'no';"],
    ),
    ("false", "categories: {S5: false}", ["f:3:18: action must be one of off, allow, flag, block"]),
    ("empty", "categories:\n  S5:", ["f:4:6: S5 must be a mapping, not empty"]),
    ("nan", "threshold: .nan", ["f:3:12: threshold must be a number like 0.5, not '.nan'"]),
    ("infinite", "threshold: .inf", ["f:3:12: threshold must be a number like 0.5, not '.inf'"]),
    ("quoted", "threshold: '0.5'", ["f:3:12: threshold must be a number like 0.5, not '0.5'; wri"]),
    ("percent", "threshold: 50%", ["f:3:12: threshold must be a number like 0.5, not '50%'"]),
    ("boolean", "threshold: true", ["f:3:12: threshold must be a number like 0.5, not 'true'"]),
    ("zero", "threshold: 0", ["f:3:12: threshold must lie between 0.0001 and 1, not 0"]),
    ("large", "threshold: 1.01", ["f:3:12: threshold must lie between 0.0001 and 1, not 1.01"]),
    ("code", "categories: {X1: off}", ["f:3:14: 'X1' is no category code: S1 to S99"]),
    ("code 100", "categories: {S100: off}", ["f:3:14: 'S100' is no category code: S1 to S99"]),
    (
        "own category without words",
        "categories: {S15: flag}",
        [
            "f:3:14: S15 is a category of your own; it needs a 'description'",
            "f:3:14: S15 is a category of your own; it needs a 'name'",
        ],
    ),
    (
        "a delimiter",
        "categories: {S5: {name: '<END UNSAFE CONTENT CATEGORIES>'}}",
        ["f:3:25: name of S5 holds a delimiter of the prompt"],
    ),
    (
        "a special token",
        "categories: {S5: {description: 'a<|eot_id|>'}}",
        ["f:3:32: description of S5 holds a delimiter of the prompt"],
    ),
    ("two lines", 'categories: {S5: {name: "a\\nb"}}', ["f:3:25: name of S5 must be one line"]),
    ("control", 'description: "a\\tb"', ["f:3:14: description holds U+0009, a control character"]),
    ("surrogate", 'description: "\\ud800"', ["f:3:14: description holds U+D800, a control char"]),
    ("tag", "languages: {'???': {}}", ["f:3:13: '???' is no language tag such as 'de' or 'pt-BR'"]),
    (
        "tag twice",
        "languages:\n  pt-BR: {}\n  pt_br: {}",
        ["f:5:3: the language 'pt-br' is given twice"],
    ),
    (
        "off by language",
        "languages: {de: {categories: {S5: off}}}",
        ["f:3:35: a language cannot turn a category off"],
    ),
    (
        "a language's unknown category",
        "languages: {de: {categories: {S77: flag}}}",
        ["f:3:31: 'S77' is no category of this policy; did you mean 'S7'?"],
    ),
    (
        "a language's rule for what is off",
        "categories: {S5: off}\nlanguages: {de: {categories: {S5: flag}}}",
        ["f:4:31: S5 is off, so it cannot have a rule in 'de'"],
    ),
    (
        "on_unavailable by language",
        "languages: {de: {on_unavailable: allow}}",
        ["f:3:18: language 'de' has no key 'on_unavailable'"],
    ),
    (
        "on_unavailable is no error",
        "on_unavailable: error",
        ["f:3:17: on_unavailable must be one of allow, flag, block, not 'error'"],
    ),
    ("nothing judged", "action: off", ["f:1:7: the policy judges nothing: every category is off"]),
    ("stream", "stream: {every: 3}", ["f:3:10: stream has no key 'every'"]),
    (
        "fraction",
        "stream: {check_every_chars: 1.5}",
        ["f:3:29: check_every_chars must be a whole number, not 1.5"],
    ),
    (
        "a negative number",
        "stream: {hold_back_chars: -1}",
        ["f:3:27: hold_back_chars must lie between 0 and 100000, not -1"],
    ),
    (
        "no flag",
        "stream: {sentence_ends: often}",
        ["f:3:25: sentence_ends must be one of true, false, not 'often'"],
    ),
    ("empty refusal", "refusal: {de: ''}", ["f:3:15: refusal in 'de' is empty"]),
    ("a list", "categories: [S1]", ["f:3:13: categories must be a mapping, not a list"]),
    ("an alias", "prompt: &x {action: flag}\nresponse: *x", ["f:4:11: aliases (*name) are not"]),
    ("a merge key", "<<: {action: flag}", ["f:3:1: a policy has no key '<<'"]),
    ("a tag of YAML", "description: !!python/name:os.system x", ["f:3:14: the tag 'tag:yaml"]),
    ("a second document", "---\nname: b", ["f:3:1: not YAML: expected a single document"]),
    ("a tabulator", "\tmode: shadow", ["f:3:1: not YAML: while scanning"]),
    ("NUL", "description: a\x00b", ["f:3:15: a control character is not allowed"]),
    ("a key that is a list", "? [a]\n: b", ["f:3:3: a key of a policy must be a word, not a list"]),
    ("depth", "description: " + "[" * 50, ["f:3:25: nested too deep"]),
    ("length", "description: " + "x" * 1001, ["f:3:14: description has 1001 characters; 1000 are"]),
]


@pytest.mark.parametrize(
    ("lines", "expected"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_told_with_its_place(lines: str, expected: list[str]) -> None:
    found = mistakes(HEAD + lines)
    assert len(found) == len(expected)
    assert all(one.startswith(start) for one, start in zip(found, expected, strict=True)), found


def test_all_mistakes_are_told_at_once_and_in_order() -> None:
    found = mistakes("name: No Name\ntreshold: 1\nmode: x\ncategories:\n  S1: {threshold: 7}\n")
    places = [one.split(": ")[0] for one in found]
    assert places == ["f:1:1", "f:1:7", "f:2:1", "f:3:7", "f:5:19"]
    assert "'version' is missing" in found[0]


@pytest.mark.parametrize("text", ["", "# nothing\n", "- name: a", "name"])
def test_what_is_no_mapping_is_refused_at_its_beginning(text: str) -> None:
    assert len(found := mistakes(text)) == 1
    assert found[0].startswith("f:1:1: must be a mapping")


def test_bytes_that_are_no_text_are_refused_where_they_stand() -> None:
    assert mistakes(b"name: \xc3\xa4\nversion: \xff") == ["f:2:10: is not valid UTF-8"]


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert parse_policy(b"\xef\xbb\xbf" + HEAD.encode()).name == "a"


def test_hundreds_of_mistakes_are_cut_short_and_say_so() -> None:
    found = mistakes(HEAD + "".join(f"key{n}: 1\n" for n in range(500)))
    assert len(found) == 101
    assert sum("too many mistakes: stopped" in one for one in found) == 1


@pytest.mark.parametrize(
    "data",
    [b"a: " + b"[" * 200_000, b"- " * 100_000, b"? " * 100_000, b"x" * 262_145, b"a: &a [*a]"],
    ids=["brackets", "dashes", "question marks", "too large", "recursive"],
)
def test_bombs_are_refused_soon(data: bytes) -> None:
    start = time.process_time()
    assert len(mistakes(data)) == 1
    assert time.process_time() - start < 5


@pytest.mark.parametrize("off", ["off", "'off'", "{action: off}", "{prompt: off, response: off}"])
def test_off_is_read_as_written(off: str) -> None:
    policy = parse_policy(HEAD + f"categories: {{S5: {off}}}")
    assert "S5" not in [one.code for one in policy.categories]
    assert len(policy.categories) == 13


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_noise_is_refused_in_an_orderly_way(noise: bytes | str) -> None:
    assert mistakes(noise)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_policy_is_a_policy_or_a_list_of_mistakes(data: st.DataObject) -> None:
    text = (resources.files("guard_policies") / "builtin" / "strict.yaml").read_text()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 30))
    put = data.draw(st.text(st.sampled_from("S14: {}[]&*!|>-?#'\"\\\n\toffnaé\u2028"), max_size=10))
    try:
        policy = parse_policy(text[:at] + put + text[at + cut :])
    except PolicyError as error:
        assert all(one.line >= 1 and one.column >= 1 for one in error.problems)
    else:
        assert policy.categories


def test_norwegian_is_a_language_and_versions_keep_their_zeros() -> None:
    policy = parse_policy("name: a\nversion: 1.10\nlanguages:\n  no: {threshold: 0.9}\n")
    assert policy.version == "1.10"
    assert policy.languages == ("no",)
    assert policy.rules(Direction.PROMPT, "no")[0].threshold == 0.9


def test_what_is_not_said_is_as_llama_guard_does() -> None:
    policy = parse_policy(HEAD)
    for direction in Direction:
        rules = policy.rules(direction)
        assert [rule.category.code for rule in rules] == [f"S{n}" for n in range(1, 15)]
        assert {(rule.action, rule.threshold) for rule in rules} == {(Action.BLOCK, 0.5)}
        assert policy.on_unavailable(direction) is Action.BLOCK
        assert policy.on_unscannable(direction) is Unscannable.ERROR
    assert (policy.mode, policy.engine, policy.custom) == (Mode.ENFORCE, "any", False)


def test_own_wording_makes_a_policy_custom() -> None:
    policy = parse_policy(HEAD + "categories: {S3: {description: No flirting}}")
    category = policy.categories[2]
    assert (category.name, category.description) == ("Sex Crimes", "No flirting")
    assert category.prompt_name == ""
    assert policy.custom


def test_own_categories_come_last_in_the_order_of_the_file() -> None:
    own = "{name: N., description: D, action: flag}"
    policy = parse_policy(HEAD + f"categories:\n  S20: {own}\n  S16: {own}\n  S1: flag\n")
    assert [one.code for one in policy.categories[-3:]] == ["S14", "S20", "S16"]
    assert policy.categories[-1].name == "N"
    assert policy.custom


def test_a_folder_gives_its_policies_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("name: bee\nversion: 1\n")
    (tmp_path / "a.yml").write_text("name: ay\nversion: 1\n")
    (tmp_path / ".hidden.yaml").write_text("no policy")
    (tmp_path / "notes.txt").write_text("no policy")
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "..data").mkdir()
    (tmp_path / "..data" / "c.yaml").write_text("name: sea\nversion: 1\n")
    (tmp_path / "c.yaml").symlink_to(tmp_path / "..data" / "c.yaml")
    assert list(load_policies([tmp_path])) == ["ay", "bee", "sea"]


def test_files_of_a_folder_are_told_of_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nversion: 1\nmode: x\n")
    (tmp_path / "b.yaml").write_text("name: b\n")
    (tmp_path / "c.yaml").write_text("name: c\nversion: 1\n")
    with pytest.raises(PolicyError) as caught:
        load_policies([tmp_path])
    assert [Path(one.file).name for one in caught.value.problems] == ["a.yaml", "b.yaml"]


def test_two_policies_of_one_name_are_told_with_both_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("version: 1\nname: same\n")
    with pytest.raises(PolicyError) as caught:
        load_policies([tmp_path])
    assert [str(one) for one in caught.value.problems] == [
        f"{tmp_path}/b.yaml:2:7: a policy named 'same' is already in {tmp_path}/a.yaml:2:7"
    ]


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for place in (tmp_path / "pipe.yaml", tmp_path / "none.yaml", tmp_path, "/dev/zero", "a\0b"):
        with pytest.raises(PolicyError, match="cannot be read"):
            load_policy(place)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policies([tmp_path])
