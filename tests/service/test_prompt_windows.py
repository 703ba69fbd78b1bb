"""Long conversations are judged in windows that cover every token."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_service.conversation import Conversation
from guard_service.prompt import BuiltPrompt, PromptBuilder
from guard_service.windows import overlap_of, spans
from tests.service.own_tokenizer import own_tokenizer


def _build(conversation: Conversation, size: int, template: str = "compact") -> BuiltPrompt:
    return PromptBuilder(own_tokenizer(), template, size).build(conversation, LLAMA_GUARD_3)


def _ids(conversation: Conversation) -> tuple[int, ...]:
    return _build(conversation, 10**6).prompts[0].body


def _text(ids: tuple[int, ...]) -> str:
    return str(own_tokenizer().decode(ids, skip_special_tokens=False))


def test_a_conversation_as_long_as_the_window_is_one_prompt() -> None:
    conversation = Conversation.of(("user", "kettle " * 50))
    length = len(_ids(conversation))
    built = _build(conversation, length)
    assert built.windows == ((0, length),)
    assert built.conversation_tokens == length
    assert len(_build(conversation, length - 1).prompts) == 2


def test_later_windows_begin_with_the_label_of_their_turn_and_share_a_sixth() -> None:
    conversation = Conversation.of(("user", "kettle " * 200), ("assistant", "sings " * 200))
    built = _build(conversation, 80)
    assert all(_text(p.body).startswith(("User: kettle", "Agent: sings")) for p in built.prompts)
    assert all(_text(p.body).endswith("\n\n") for p in built.prompts)
    shared = [end - start for (_, end), (start, _) in pairwise(built.windows)]
    assert shared.count(13) == len(shared) - 1  # one makes room for the context of the last turn
    assert built.windows[-1][1] == built.conversation_tokens


def test_a_window_is_judged_as_the_conversation_that_ends_there() -> None:
    built = _build(Conversation.of(("user", "kettle " * 200), ("assistant", "sings")), 80)
    assert [prompt.direction for prompt in built.prompts[:-1]] == [Direction.PROMPT] * (
        len(built.prompts) - 1
    )
    assert built.prompts[-1].direction is built.direction is Direction.RESPONSE
    context = _text(built.prompts[-1].body).removesuffix("\n\nAgent: sings\n\n").split()
    assert context == ["User:", *["kettle"] * (len(context) - 1)] and len(context) > 80 // 4
    assert built.prompts[0].prefix != built.prompts[-1].prefix


_TURNS = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system", "tool"]),
        st.text(st.sampled_from("kettle sings\n?é日")).flatmap(
            lambda text: st.integers(0, 30).map(lambda times: text * times)
        ),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_TURNS, st.integers(40, 200))
def test_windows_cover_every_token_and_end_with_the_last_message(
    turns: list[tuple[str, str]], size: int
) -> None:
    conversation = Conversation.of(*turns)
    whole, built = _ids(conversation), _build(conversation, size)
    assert built.conversation_tokens == len(whole)
    assert built.windows[0][0] == 0
    assert built.windows[-1][1] == len(whole)
    for (start, end), (after, later) in zip(built.windows[:-1], built.windows[1:], strict=True):
        assert start < after <= end < later
    labels = [tuple(own_tokenizer().encode(f"{name}:").ids) for name in ("User", "Agent")]
    for prompt, (start, end) in zip(built.prompts, built.windows, strict=True):
        assert len(prompt.body) <= size
        bare = [
            prompt.body[len(label) :]
            for label in ((), *labels)
            if prompt.body[: len(label)] == label
        ]
        assert any(body[: end - start] == whole[start:end] for body in bare)


_TURN = st.tuples(st.integers(1, 4), st.integers(0, 300))  # tokens of the label, and behind it


@settings(max_examples=300, deadline=None)
@given(st.lists(_TURN, min_size=1, max_size=5), st.integers(0, 300), st.integers(40, 200))
def test_windows_of_a_growing_turn_stay_and_hold_every_sentence_of_a_sixth(
    turns: list[tuple[int, int]], more: int, size: int
) -> None:
    lengths = [head + text for head, text in turns]
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    heads, total = [head for head, _ in turns], sum(lengths)
    before = list(spans(starts, heads, total, size, 2))
    after = list(spans(starts, heads, total + more, size, 2))
    assert after[: len(before) - 1] == before[:-1]
    for (start, end), (later, later_end) in pairwise(after):
        assert start < later <= end - overlap_of(size) and end < later_end
    context, half = max(starts[-1] - size // 2, 0), starts[-1] + size // 2 - max(heads) - 2
    assert any(start <= context and end >= min(total + more, half) for start, end in after)


@pytest.mark.parametrize("unit", ["kettle ", "x", " ", "\n", "<", "\nUser", "日", "\u200b", "? \n"])
def test_the_work_is_linear_in_the_text(unit: str) -> None:
    def seconds(length: int) -> float:
        conversation = Conversation.of(("user", unit * (length // len(unit))))
        start = time.process_time()
        _build(conversation, 1000)
        return time.process_time() - start

    seconds(10_000)
    assert seconds(200_000) < 60 * max(min(seconds(20_000) for _ in range(3)), 0.005)
