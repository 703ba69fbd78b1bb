"""Backends that are called in process: screened as over HTTP, answered in their own shapes."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import Blocked, guarded
from guard_middleware.loop_thread import LOOP
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids, text_of
from tests.middleware.asgi_calls import EVENTS, Backend, each, listening
from tests.middleware.formats.openai_replies import asking, chunks, reply
from tests.middleware.models import Llama, Messages, Model, TextGenerationPipeline
from tests.middleware.wrapped import BAD, SAFE, fits

NO = "No."


def screened(backend: Any, guard: FakeGuard | None = None, **settings: Any) -> Any:
    """With a guard that forbids BAD unless it is given another, and counters of its own."""
    settings.setdefault("metrics", Metrics(CollectorRegistry()))
    return guarded(backend, guard or FakeGuard(forbids(BAD)), refusal=NO, **settings)


def collected(stream: AsyncIterator[Any]) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [one async for one in stream]

    return asyncio.run(all_of_it())


def chat_text(events: list[Any]) -> str:
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in events)


def completion_text(events: list[Any]) -> str:
    return "".join(one["choices"][0]["text"] for one in events)


WAYS: dict[str, Callable[[Model, Any, Any], str]] = {
    "function": lambda model, ask, given: str(screened(model.whole, **given)(ask)),
    "async function": lambda model, ask, given: str(
        asyncio.run(screened(model.awaited, **given)(ask))
    ),
    "generator": lambda model, ask, given: "".join(screened(model.stream, **given)(ask)),
    "async generator": lambda model, ask, given: "".join(
        collected(screened(model.astream, **given)(ask))
    ),
    "llama chat": lambda model, ask, given: str(
        screened(Llama(model), **given).create_chat_completion(
            messages=[{"role": "user", "content": ask}]
        )["choices"][0]["message"]["content"]
    ),
    "llama chat stream": lambda model, ask, given: chat_text(
        list(
            screened(Llama(model), **given).create_chat_completion(
                [{"role": "user", "content": ask}], stream=True
            )
        )
    ),
    "llama text": lambda model, ask, given: str(
        screened(Llama(model), **given)(ask)["choices"][0]["text"]
    ),
    "llama text stream": lambda model, ask, given: completion_text(
        list(screened(Llama(model), **given).create_completion(ask, stream=True))
    ),
}


def said_before(refused: str) -> str:
    """What a caller was given before the refusal."""
    return refused.removesuffix(NO).removesuffix("\n\n")


STREAMS = [name for name in WAYS if "stream" in name or "generator" in name]
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_allowed_reply_is_the_backends(way: str) -> None:
    model = Model(SAFE)
    assert WAYS[way](model, "Hi", {}) == SAFE
    assert len(model.asked) == 1


@every_way
def test_blocked_prompt_never_reaches_the_backend(way: str) -> None:
    model = Model(SAFE)
    assert WAYS[way](model, f"Make a {BAD}", {}) == NO
    assert model.asked == []


@every_way
def test_blocked_reply_is_a_refusal(way: str) -> None:
    got = WAYS[way](Model(SAFE + BAD), "Hi", {})
    released = said_before(got)
    assert fits(released, SAFE + BAD) and (released == "" or way in STREAMS)
    assert BAD not in got
    assert got.endswith(NO) or way.startswith("llama") and way in STREAMS


@every_way
@pytest.mark.parametrize("ask", ["Hi", BAD])
def test_refusals_are_raised_where_that_was_set(way: str, ask: str) -> None:
    with pytest.raises(Blocked, match=NO) as raised:
        WAYS[way](Model(SAFE + BAD), ask, {"refuse_with": "error"})
    assert BAD not in str(raised.value) and raised.value.id


class Down(FakeGuard):
    """Says nothing."""

    async def judge(self, conversations: Any) -> Any:
        raise ConnectionError

    async def growing(self, conversation: Any, pieces: Any) -> Any:
        raise ConnectionError
        yield


@every_way
def test_guard_that_says_nothing_blocks(way: str) -> None:
    model = Model(SAFE)
    assert WAYS[way](model, "Hi", {"guard": Down()}) == NO and model.asked == []


@every_way
@pytest.mark.parametrize("said", [SAFE, SAFE + BAD])
def test_shadow_mode_changes_nothing_and_reports(way: str, said: str) -> None:
    registry, model = CollectorRegistry(), Model(said)
    given = {"mode": "shadow", "metrics": Metrics(registry)}
    assert WAYS[way](model, "Hi", given) == said
    result = "passed" if said == SAFE else "blocked_response"
    until(lambda: counted(registry, result) == 1.0)


def counted(registry: CollectorRegistry, result: str) -> float:
    return sum(
        sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "guard_middleware_exchanges_total" and sample.labels["result"] == result
    )


def until(true: Callable[[], bool]) -> None:
    """Waits for what the guard's loop does beside the caller."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("result", ["passed", "blocked_prompt", "blocked_response", "gone"])
def test_calls_are_counted(result: str) -> None:
    registry = CollectorRegistry()
    model = Model(SAFE + BAD * (result == "blocked_response"))
    stream = screened(model.stream, metrics=Metrics(registry))(
        BAD if result == "blocked_prompt" else "Hi"
    )
    next(stream)
    if result == "gone":
        stream.close()
    else:
        list(stream)
    assert counted(registry, result) == 1.0
    assert model.closed == (result != "blocked_prompt")
    assert registry.get_sample_value("guard_middleware_in_progress") == 0.0


# No piece of a stream is given before a verdict that covers it.


@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("size", [1, 7])
def test_nothing_of_a_violation_is_given_wherever_it_stands(way: str, size: int) -> None:
    text = "Olá, it is mild in Lisbon today: 21 °C, said €1 of tea."
    cases = 0
    for at in range(len(text) + 1):
        guard = FakeGuard(forbids("§"), every_chars=5)
        model = Model(text[:at] + "§" + text[at:], size)
        given = {"guard": guard, "first_check_chars": 8}
        got = said_before(WAYS[way](model, "Hi", given))
        assert text[:at].startswith(got)  # not a byte from the violation on
        assert any(allowed.startswith(got) for allowed in guard.allowed)
        assert guard.open_streams == 0 and model.closed == 1
        cases += 1
    assert cases == 56


async def test_stream_is_held_back_while_the_guard_thinks() -> None:
    thinks = asyncio.Event()
    given: list[str] = []
    verdicts = 0

    def gate() -> Any:
        nonlocal verdicts
        verdicts += 1
        return wait() if verdicts > 1 else asyncio.sleep(0)

    async def wait() -> None:
        while not thinks.is_set():
            await asyncio.sleep(0.001)

    async def read() -> None:
        async for piece in screened(Model(SAFE).astream, FakeGuard(gate=gate))("Hi"):
            given.append(piece)

    reading = asyncio.create_task(read())
    while verdicts < 2:
        await asyncio.sleep(0.001)
    assert given == []
    thinks.set()
    await reading
    assert "".join(given) == SAFE


def test_backend_waits_while_too_much_is_held_back() -> None:
    guard = FakeGuard(every_chars=10**9)
    stream = screened(Model(SAFE * 10).stream, guard, hold_chars=100)("Hi")
    assert next(stream) == SAFE[:7]
    assert all(len(text) < 600 for text in guard.allowed)
    stream.close()


def test_backend_that_fails_gives_out_nothing_that_was_held_back() -> None:
    def failing(prompt: str) -> Iterator[str]:
        yield "secret"
        raise OSError("gone")

    given: list[str] = []
    with pytest.raises(OSError, match="gone"):
        for piece in screened(failing)("Hi"):
            given.append(piece)
    assert given == []


# What is judged is what is called with.


def test_old_exchange_that_is_not_allowed_is_left_out() -> None:
    past = asking("Hi", BAD, "And now?")["messages"]
    model = Model("Hello.")
    screened(model.whole)(past)
    screened(Llama(model)).create_chat_completion(messages=past)
    assert model.asked == [past[2:]] * 2


def test_messages_are_read_once() -> None:
    class Changing(dict[str, Any]):
        def items(self) -> Any:
            yield from (("role", "user"), ("content", "Hi"))

    model = Model("Hello.")
    screened(model.whole)([Changing(role="user", content=BAD)])
    assert model.asked == [[{"role": "user", "content": "Hi"}]]


@pytest.mark.parametrize("context", [BAD, [BAD], {"document": BAD}, {BAD: 1}])
def test_other_arguments_of_a_function_are_judged(context: Any) -> None:
    asked = []

    def answer(prompt: str, context: Any = None, **more: Any) -> str:
        asked.append(prompt)
        return "Hello."

    for trust in ("judge", "trust"):
        call = screened(answer, system_turns=trust)
        assert call("Hi", context) == call("Hi", tokenizer=context) == NO and asked == []
    assert call("Hi", context="tea", more=1) == "Hello."


@pytest.mark.parametrize(
    "given", [{"tools": [{"function": {"name": BAD}}]}, {"stop": [], "functions": [BAD]}]
)
def test_definitions_of_tools_are_judged(given: dict[str, Any]) -> None:
    model = Model("Hello.")
    screened(Llama(model)).create_chat_completion([{"role": "user", "content": "Hi"}], **given)
    assert model.asked == []


@pytest.mark.parametrize(
    "spoken",
    [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": BAD, "arguments": "{}"}}
            ],
        },
        {"role": "assistant", "content": "Hi", "reasoning_content": BAD},
    ],
)
def test_every_text_of_a_reply_is_judged(spoken: dict[str, Any]) -> None:
    class Calling(Llama):
        def create_chat_completion(self, messages: Messages) -> Any:  # type: ignore[override]
            whole = reply("x")
            return {**whole, "choices": [{**whole["choices"][0], "message": spoken}]}

    got = screened(Calling(Model(""))).create_chat_completion([{"role": "user", "content": "Hi"}])
    assert got["choices"][0]["finish_reason"] == "content_filter" and BAD not in str(got)


@pytest.mark.parametrize(
    ("name", "own"),
    [("logits_processor", [len]), ("logit_bias", {97: -1.0}), ("grammar", object())],
)
def test_objects_through_which_no_text_goes_are_handed_on(name: str, own: Any) -> None:
    seen = []

    class Noting(Llama):
        def create_chat_completion(self, messages: Messages, **more: Any) -> Any:  # type: ignore[override]
            seen.append(more[name])
            return reply("Hello.")

    messages = [{"role": "user", "content": "Hi"}]
    screened(Noting(Model(""))).create_chat_completion(messages, **{name: own})
    assert len(seen) == 1 and seen[0] is own


# Pipelines.


def test_pipeline_answers_texts_chats_and_batches_of_both() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    pipe = screened(TextGenerationPipeline(" there."))
    assert pipe("Hi") == [{"generated_text": "Hi there."}]
    assert pipe("Hi", return_full_text=False) == [{"generated_text": " there."}]
    assert pipe(["Hi", "Ho"]) == [
        [{"generated_text": "Hi there."}],
        [{"generated_text": "Ho there."}],
    ]
    turn = {"role": "assistant", "content": " there."}
    assert pipe(chat) == [{"generated_text": [*chat, turn]}]
    assert (
        pipe([chat, chat], num_return_sequences=2) == [[{"generated_text": [*chat, turn]}] * 2] * 2
    )


def test_pipeline_refuses_in_the_shape_of_its_reply() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    refusal = {"role": "assistant", "content": NO}
    for said, ask in ((BAD, "Hi"), (" there.", BAD)):
        raw = TextGenerationPipeline(said)
        pipe = screened(raw)
        asked = [{"role": "user", "content": ask}]
        assert pipe(ask) == [{"generated_text": ask + NO}]
        assert pipe(ask, return_full_text=False) == [{"generated_text": NO}]
        assert pipe(["Ho", ask]) == [
            [{"generated_text": "Ho" + NO}],
            [{"generated_text": ask + NO}],
        ]
        assert pipe([chat, asked]) == [
            [{"generated_text": [*chat, refusal]}],
            [{"generated_text": [*asked, refusal]}],
        ]
        assert pipe(asked, num_return_sequences=2) == [{"generated_text": [*asked, refusal]}] * 2
        assert (raw.asked == []) == (ask == BAD)


def test_each_reply_of_a_pipeline_is_judged_with_its_own_prompt_and_without_repeating_it() -> None:
    guard = FakeGuard()
    screened(TextGenerationPipeline("!"), guard)(["a", "b"], num_return_sequences=2)
    said = [[text_of(one.parts[0]) for one in asked.messages] for asked in guard.asked]
    assert said == [["a"], ["b"], ["a", "!"], ["a", "!"], ["b", "!"], ["b", "!"]]


@pytest.mark.parametrize("name", ["truncation", "handle_long_generation"])
def test_prompt_that_a_pipeline_cuts_is_not_what_was_judged(name: str) -> None:
    raw = TextGenerationPipeline(" there.")
    assert screened(raw)("Hi", **{name: "hole"}) == [{"generated_text": "Hi" + NO}]
    assert screened(raw, unscannable="pass")("Hi", **{name: "hole"}) == [
        {"generated_text": "Hi there."}
    ]


def test_batch_is_blocked_whole() -> None:
    raw = TextGenerationPipeline(" there.")
    past = asking("Hi", BAD, "And now?")["messages"]
    screened(raw)([past, past[2:]])
    assert raw.asked == []
    screened(raw)(past)
    assert raw.asked == [past[2:]]


# Clients of OpenAI's kind.


@asynccontextmanager
async def client(backend: Backend) -> AsyncIterator[Any]:
    async with (
        listening(backend) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own,
    ):
        yield screened(own)


async def test_openai_client_gets_its_own_objects() -> None:
    async with client(Backend([json.dumps(reply("Hello.")).encode()])) as own:
        got = await own.chat.completions.create(**asking("Hi"))
        no = await own.chat.completions.create(**asking(BAD))
    assert type(got) is type(no) and got.choices[0].message.content == "Hello."
    assert (no.choices[0].finish_reason, no.choices[0].message.content) == ("content_filter", NO)


@pytest.mark.parametrize(("said", "reason"), [(SAFE, "stop"), (SAFE + BAD, "content_filter")])
async def test_openai_client_gets_the_chunks_that_are_allowed(said: str, reason: str) -> None:
    async with client(Backend(each(chunks(said)), EVENTS)) as own:
        stream = await own.chat.completions.create(**asking("Hi", stream=True))
        events = [event async for event in stream]
    text = "".join(one.choices[0].delta.content or "" for one in events)
    assert fits(text, said, NO)
    assert events[-1].choices[0].finish_reason == reason
    assert len({type(event) for event in events}) == 1


def test_only_screened_methods_are_there() -> None:
    with openai.OpenAI(api_key="x") as client_:
        own = screened(client_)
    for place, name in (
        *((own, name) for name in ("embeddings", "responses", "with_raw_response", "beta")),
        (own.chat.completions, "with_raw_response"),
        (screened(Llama(Model(""))), "model"),
        (screened(Model("").whole), "__wrapped__"),
    ):
        assert not hasattr(place, name)
    with pytest.raises(TypeError, match="not called"):
        own("Hi")


# What is no backend, no call, no reply.


class Unknown:
    """Of a known library, but of no known class."""

    def __call__(self, prompt: str) -> str:
        return "unscreened"


Unknown.__module__ = "transformers.pipelines.image_text_to_text"


@pytest.mark.parametrize(
    "backend", [None, "model", object(), Llama, dict, Unknown(), lambda: "", lambda *args: "", max]
)
def test_unknown_backends_are_refused_when_they_are_wrapped(backend: Any) -> None:
    with pytest.raises(TypeError):
        screened(backend)


@pytest.mark.parametrize(
    "ask", [None, 1, b"Hi", {"role": "user"}, object(), iter(["Hi"]), [object()]]
)
def test_what_is_no_prompt_is_refused_when_it_is_asked(ask: Any) -> None:
    for backend in (model := Model("x"), TextGenerationPipeline("x")):
        call = screened(backend.whole if isinstance(backend, Model) else backend)
        with pytest.raises((TypeError, ValueError)):
            call(ask)
        assert (backend.asked, model.asked) == ([], [])


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": object()},
        {"tools": [object()]},
        {"messages": [{"role": "user", "content": object()}]},
        {"messages": [{"role": "root", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi", "Content": BAD}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"temperature": float("nan")},
    ],
)
def test_arguments_that_cannot_be_screened_are_errors(given: dict[str, Any]) -> None:
    model = Model("x")
    with pytest.raises((TypeError, ValueError)) as raised:
        screened(Llama(model)).create_chat_completion(
            **{"messages": [{"role": "user", "content": "Hi"}], **given}
        )
    assert model.asked == [] and BAD not in str(raised.value)


@pytest.mark.parametrize("name", ["streamer", "extra_body"])
def test_ways_round_the_guard_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        screened(TextGenerationPipeline("x"))("Hi", **{name: {"messages": BAD}})


@pytest.mark.parametrize("said", [None, 1, b"x", ["x"], object(), iter("x")])
def test_replies_that_are_no_texts_are_errors(said: Any) -> None:
    def whole(prompt: str) -> Any:
        return said

    async def awaited(prompt: str) -> Any:
        return said

    def pieces(prompt: str) -> Iterator[Any]:
        yield said

    with pytest.raises(TypeError):
        screened(whole)("Hi")
    with pytest.raises(TypeError):
        asyncio.run(screened(awaited)("Hi"))
    with pytest.raises(TypeError):
        list(screened(pieces)("Hi"))


@pytest.mark.parametrize(
    "said",
    [
        None,
        "x",
        [{}],
        [{"generated_text": 1}],
        [{"generated_token_ids": [1]}],
        {"generated_text": "x"},
    ],
)
def test_replies_of_pipelines_of_other_shapes_are_errors(said: Any) -> None:
    class Other(TextGenerationPipeline):
        def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
            return said

    with pytest.raises(TypeError):
        screened(Other(""))("Hi")


def test_function_that_gives_a_generator_is_told_to_be_one() -> None:
    with pytest.raises(TypeError, match="generator"):
        screened(lambda prompt: Model("x").stream(prompt))("Hi")


def test_reply_that_cannot_be_read_is_a_refusal() -> None:
    assert screened(lambda prompt: "\ud800")("Hi") == NO
    assert list(screened(Model("\ud800").stream)("Hi")) == [NO]


# Callables of every kind.


class Answering:
    """Instances are called."""

    def __call__(self, prompt: str) -> Iterator[str]:
        yield "Hello."


def test_callables_of_every_kind_are_told_apart() -> None:
    def positional(prompt: str, /, name: str = "you") -> str:
        """Documented."""
        return f"Hello {name}."

    async def awaited(prompt: str, end: str) -> str:
        return f"Hello{end}"

    assert "".join(screened(Answering())("Hi")) == "Hello."
    assert screened(positional)("Hi", name="me") == "Hello me."
    assert screened(positional).__doc__ == "Documented."
    assert asyncio.run(screened(functools.partial(awaited, end="."))("Hi")) == "Hello."
    assert screened(lambda prompt: "Hello.")(prompt="Hi") == "Hello."


def test_guard_of_its_own_is_let_go_of_with_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Closing(FakeGuard):
        async def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("guard_middleware.in_code.open_guard", lambda settings: Closing())
    stream = guarded(Model(SAFE).stream, metrics=Metrics(CollectorRegistry()))("Hi")
    gc.collect()
    LOOP.wait(asyncio.sleep(0))  # behind what was submitted before
    assert closed == [] and "".join(stream) == SAFE
    del stream
    until(lambda: gc.collect() >= 0 and len(closed) == 1)
