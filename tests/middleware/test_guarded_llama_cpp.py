"""guarded() around a real `llama_cpp.Llama`, with a tiny GGUF.

Where it is installed (pip install 'llama-guard-service[peers]'): it is compiled, which takes long.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import Blocked, guarded
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, text_of
from guard_policies.assessment import Action
from tests.middleware.tiny_gguf import LOADED, tiny_gguf
from tests.middleware.wrapped import BAD

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLED = {"type": "function", "function": {"name": "look"}}
JSON = {"type": "json_object"}
KNOBS = {"max_tokens": 60, "temperature": 0.0}
Ask = Callable[..., Any]


def chat(llama: Any, text: str = "Hi", **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return llama.create_chat_completion(messages, **{**KNOBS, **more})


def complete(llama: Any, text: str = "Hi", **more: Any) -> Any:
    return llama.create_completion(text, **{**KNOBS, **more})


def called(llama: Any, text: str = "Hi", **more: Any) -> Any:
    return llama(text, **{**KNOBS, **more})


every_way = pytest.mark.parametrize("ask", [chat, complete, called])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tiny_gguf(tmp_path_factory.mktemp("model"))
    return llama_cpp.Llama(str(file), **LOADED, logits_all=True, verbose=False)


def screened(llama: Any, guard: FakeGuard, **settings: Any) -> Any:
    return guarded(llama, guard, metrics=Metrics(CollectorRegistry()), refusal="No.", **settings)


def plain(reply: Any) -> Any:
    """A reply, or the chunks of one, without what is new in every reply."""
    if isinstance(reply, dict):
        return {key: plain(one) for key, one in reply.items() if key not in ("id", "created")}
    return [plain(one) for one in reply] if isinstance(reply, list | Iterator) else reply


def said(reply: Any) -> str:
    """The text of a reply, or of the chunks of one."""
    choices = [one["choices"][0] for one in ([reply] if isinstance(reply, dict) else reply)]
    texts = [one.get("text", one.get("message", one.get("delta"))) for one in choices]
    return "".join((one if isinstance(one, str) else one.get("content")) or "" for one in texts)


def long_replies(text: str) -> Action:
    """Blocks what the model says at its 31st letter, and prompts with BAD."""
    return Action.BLOCK if BAD in text or len(text) > 30 else Action.ALLOW


@pytest.mark.parametrize(
    ("ask", "more"),
    [
        *itertools.product([chat, complete, called], [{}, {"seed": 1}, {"stop": ["j"]}]),
        *itertools.product([complete, called], [{"echo": True}, {"logprobs": 2}]),
        (chat, {"logprobs": True, "top_logprobs": 2}),
        (chat, {"response_format": JSON}),
        (chat, {"tools": [TOOL], "tool_choice": CALLED}),
        (complete, {"logit_bias": {ord("a"): 100.0}}),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_allowed_reply_is_llama_cpps(
    llama: Any, ask: Ask, more: dict[str, Any], streams: bool
) -> None:
    llama.reset()  # what it has kept of a prompt changes the last digits
    wanted = plain(ask(llama, stream=streams, **more))
    llama.reset()
    assert wanted and plain(ask(screened(llama, FakeGuard()), stream=streams, **more)) == wanted


def test_grammar_is_handed_on(llama: Any) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a" "b"*', verbose=False)
    got = complete(screened(llama, FakeGuard()), grammar=grammar)
    assert re.fullmatch("ab+", said(got))


@every_way
def test_what_is_said_is_what_is_judged(llama: Any, ask: Ask) -> None:
    guard = FakeGuard()
    text = said(ask(llama))
    ask(screened(llama, guard))
    list(ask(screened(llama, guard), stream=True))
    judged = [[text_of(one.parts[0]) for one in asked.messages] for asked in guard.asked]
    assert len(text) == 60 and judged == [["Hi"], ["Hi", text], ["Hi"]]
    assert guard.streamed == [text]


@every_way
def test_prompt_and_reply_are_refused_in_its_shape(llama: Any, ask: Ask) -> None:
    own = screened(llama, FakeGuard(long_replies))
    for got in (ask(own, BAD), ask(own)):
        assert said(got) == "No." and got["choices"][0]["finish_reason"] == "content_filter"
        assert got.keys() == ask(llama).keys()


@every_way
def test_streams_end_filtered(llama: Any, ask: Ask) -> None:
    text = said(ask(llama))
    own = screened(llama, FakeGuard(long_replies, every_chars=8), first_check_chars=8)
    for prompt in (BAD, "Hi"):
        got = list(ask(own, prompt, stream=True))
        assert got[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert said(got) == "No." or prompt == "Hi" and said(got) in text[:30]


@every_way
def test_blocked_calls_raise_where_that_was_set(llama: Any, ask: Ask) -> None:
    own = screened(llama, FakeGuard(long_replies), refuse_with="error")
    for prompt in (BAD, "Hi"):
        with pytest.raises(Blocked, match="No."):
            ask(own, prompt)


def test_tokens_which_no_guard_reads_are_refused(llama: Any) -> None:
    got = screened(llama, FakeGuard())([72, 105], **KNOBS)
    assert said(got) == "No." and got["choices"][0]["finish_reason"] == "content_filter"


def test_its_other_methods_are_not_let_through(llama: Any) -> None:
    for name in ("generate", "eval", "create_chat_completion_openai_v1"):
        assert hasattr(llama, name)
        with pytest.raises(AttributeError, match="not screened"):
            getattr(screened(llama, FakeGuard()), name)
