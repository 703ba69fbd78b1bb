"""Growing replies: what sessions compute, and that their verdicts are those of the whole text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_api.v1 import guard_pb2
from guard_policies.loader import builtin_policies
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.export.decoder import Precision
from guard_service.artifact import Artifact
from guard_service.batcher import Batcher, Limits
from guard_service.cascade import Cascade
from guard_service.config import Settings
from guard_service.conversation import Conversation
from guard_service.engines import Assessed, EngineFailed, open_engine
from guard_service.engines.fake import FakeEngine
from guard_service.engines.onnx import OnnxEngine
from guard_service.interceptors import CALL, Call
from guard_service.judging import Always
from guard_service.metrics import Metrics
from guard_service.moderation import Bounds, Moderator
from guard_service.prompt import Prompt
from guard_service.servicer import Servicer
from guard_service.stream import StreamBounds, judged, with_reply
from guard_service.wire import Sizes
from tests.service.asking import PATIENCE_S, fetched, piece, start, until
from tests.service.conftest import RunGuard
from tests.service.tiny_artifact import RELEASE, tiny_artifact

ASKED = "How do I fix it?"
NOISE = 1e-3
VERDICT_TOKENS = 3
FRAGMENTS = (
    *("un", "safe", "unsafe", "1", "23", " ", "\n", "\n\n", "\r", "\r\n", "a word or two, "),
    *("<END CONV", "ERSATION>", "<END CONVERSATION>", "Us", "er", "User:", "\nAgent", ": ", "："),
    *("<|eot", "_id|>", "<|begin_of_text|>", "👩\u200d👧", "\u200d", "e\u0301", "\u0301", "日本"),
)


class Tape(OnnxEngine):
    """Tells what the model has read: the tokens that its last run got, behind those of the past."""

    def __init__(self, artifact: Artifact, session_bytes: int = 2**30) -> None:
        super().__init__(artifact, session_bytes=session_bytes)
        self.read: tuple[int, ...] = ()
        self.before_run: Callable[[], None] = lambda: None

    def _call(self, names: list[str], feeds: Mapping[str, Any]) -> list[Any]:
        self.before_run()
        past = feeds["past_k.0"].shape[2]
        self.read = (*self.read[:past], *feeds["ids"][0].tolist())
        return super()._call(names, feeds)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny model in floats that sees 96 tokens of a conversation at once."""
    release = replace(RELEASE, window_tokens=96)
    floats = Precision(32, embedding_bits=32)
    return tiny_artifact(tmp_path_factory.mktemp("artifacts") / "tiny", release, precision=floats)


@pytest.fixture(scope="module")
def whole(artifact: Artifact) -> OnnxEngine:
    """For judging texts whole."""
    return OnnxEngine(artifact)


@pytest.fixture(scope="module")
def tape(artifact: Artifact) -> Tape:
    """For judging them by sessions."""
    return Tape(artifact)


def prompts_of(engine: OnnxEngine, reply: str) -> tuple[Prompt, ...]:
    """The prompts of a reply so far."""
    conversation = with_reply(Conversation.of(("user", ASKED)), reply)
    return engine.prompt_builder().build(conversation, LLAMA_GUARD_3).prompts


def own_tokens(prompt: Prompt) -> int:
    """What a prompt costs behind its prefix."""
    return len(prompt.body) + len(prompt.closing) + VERDICT_TOKENS


def assert_alike(found: Sequence[Assessed], wanted: Sequence[Assessed]) -> None:
    for one, other in zip(found, wanted, strict=True):
        scores = {**one.assessment.category_scores, "": one.assessment.unsafe_score}
        others = {**other.assessment.category_scores, "": other.assessment.unsafe_score}
        assert scores == pytest.approx(others, abs=NOISE)


@st.composite
def growing_texts(draw: st.DrawFn) -> list[str]:
    """A text as it stands after each of its pieces, cut anywhere."""
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=40)))
    cuts = draw(st.sets(st.integers(0, len(text)), max_size=4))
    return [text[:cut] for cut in sorted(cuts)] + [text]


@settings(max_examples=20, deadline=None)
@given(growing_texts())
def test_however_a_text_is_cut_the_model_reads_the_prompts_of_the_whole(
    tape: Tape, whole: OnnxEngine, artifact: Artifact, texts: list[str]
) -> None:
    verdict = artifact.manifest.verdict
    session = tape.session()
    for text in texts:
        prompts = prompts_of(whole, text)
        for prompt, wanted in zip(prompts, whole.assess(prompts), strict=True):
            cost = own_tokens(prompt) - session.held(prompt)
            (found,) = session.assess([prompt])
            behind = (*prompt.closing, verdict.unsafe, verdict.newline, verdict.mark)
            assert tape.read == (*prompt.prefix, *prompt.body, *behind)
            assert_alike([found], [wanted])
            assert found.computed_tokens in (cost, cost + len(prompt.prefix))
            assert found.computed_tokens + found.cached_tokens == len(tape.read)
    session.close()
    assert tape.session_bytes == 0


@pytest.mark.parametrize("room", [2**30, 400_000, 10])  # for both, for one, for none
def test_streams_in_turn_keep_apart_and_one_without_room_is_computed_anew(
    artifact: Artifact, whole: OnnxEngine, room: int
) -> None:
    tape = Tape(artifact, session_bytes=room)
    sessions = {text: tape.session() for text in ("unsafe words 123 ", "Другой ответ, ")}
    for length in (6, 12, 24):
        for text, session in sessions.items():
            (prompt,) = prompts_of(whole, (text * 2)[:length])
            (found,) = session.assess([prompt])
            assert_alike([found], whole.assess([prompt]))
            saved = found.computed_tokens < own_tokens(prompt)
            assert saved == (length > 6 and room == 2**30)
            assert (tape.session_bytes > 0) == (room > 10)
            assert tape.session_bytes <= room


def test_a_session_closed_during_a_run_finishes_it_and_keeps_nothing(
    artifact: Artifact, whole: OnnxEngine
) -> None:
    tape = Tape(artifact)
    session = tape.session()
    for text in ("one", "one and two"):
        session.assess(prompts_of(tape, text))
    tape.before_run = session.close
    prompts = prompts_of(tape, "one and two and three")
    assert_alike(session.assess(prompts), whole.assess(prompts))
    assert tape.session_bytes == 0


def test_a_run_that_fails_leaves_the_session_as_it_was(
    artifact: Artifact, whole: OnnxEngine
) -> None:
    def fail() -> None:
        raise EngineFailed("out of order")

    tape = Tape(artifact)
    session = tape.session()
    session.assess(prompts_of(tape, "one"))
    (prompt,) = prompts_of(tape, "one and two")
    held = session.held(prompt)
    tape.before_run = fail
    with pytest.raises(EngineFailed):
        session.assess([prompt])
    tape.before_run = lambda: None
    assert session.held(prompt) == held > 0
    assert_alike(session.assess([prompt]), whole.assess([prompt]))
    broken = replace(prompt, body=(*prompt.body, 10**6))
    with pytest.raises(EngineFailed):
        session.assess([broken])
    assert session.held(prompt) == len(prompt.body)


async def _streamed(
    guard: Any, pieces: Sequence[str], **fields: Any
) -> list[guard_pb2.ClassifyStreamResponse]:
    """One stream over gRPC, a check behind each piece; an empty piece ends it."""
    call = guard.stub.ClassifyStream()
    await call.write(start(ASKED, **fields))
    replies = []
    for text in pieces:
        await call.write(piece(text, check=True))
        replies.append(await call.read())
    await call.write(piece("", end=True))
    replies.append(await call.read())
    assert replies[-1].final and not replies[-2].final
    assert await call.read() == grpc.aio.EOF
    return replies


@pytest.mark.parametrize("window", [1200, 320])  # all of it in one, and in four
async def test_a_long_reply_costs_little_more_than_its_tokens(
    run_guard: RunGuard, tmp_path_factory: pytest.TempPathFactory, window: int
) -> None:
    release = replace(
        RELEASE, template="compact-fixed", custom_categories=False, window_tokens=window
    )
    engine = OnnxEngine(tiny_artifact(tmp_path_factory.mktemp("artifacts") / "wide", release))
    guard = await run_guard(engine)
    text = "So 12 unsafe kettles sang.\n" * 51
    pieces = [text[at : at + 43] for at in range(0, len(text), 43)]
    replies = await _streamed(guard, pieces)
    checks = [reply.verdict for reply in replies]
    closing = len(prompts_of(engine, "")[0].closing) + VERDICT_TOKENS
    whole = checks[-1].coverage
    assert len(whole.windows) == (1 if window == 1200 else 4)
    reply_tokens = whole.conversation_tokens - len(prompts_of(engine, "")[0].body)
    assert reply_tokens >= 1000
    assert reply_tokens / len(pieces) <= 33
    computed = sum(check.timing.computed_tokens for check in checks)
    assert reply_tokens < computed <= 1.3 * reply_tokens + len(checks) * closing
    assert checks[-1].timing.computed_tokens == 0  # the whole reply was judged by then
    assert engine.session_bytes == 0
    for at in (0, 1, 11, len(pieces) - 1):
        wanted = engine.assess(prompts_of(engine, "".join(pieces[: at + 1])))
        scores = [one.assessment.unsafe_score for one in wanted]
        found = [one.unsafe_score for one in checks[at].coverage.windows]
        assert found == pytest.approx(scores, abs=NOISE)
        assert checks[at].unsafe_score == pytest.approx(max(scores), abs=NOISE)


async def test_a_stream_whose_caller_is_gone_holds_nothing(run_guard: RunGuard, tape: Tape) -> None:
    guard = await run_guard(tape)
    call = guard.stub.ClassifyStream()
    await call.write(start(ASKED))
    await call.write(piece("so far", check=True))
    assert not (await call.read()).final
    assert tape.session_bytes > 0
    call.cancel()
    await until(lambda: tape.session_bytes == 0)


class Caller:
    """As much of gRPC's context as a stream looks at."""

    def time_remaining(self) -> float | None:
        return None


async def test_a_stream_that_is_closed_half_way_lets_go_at_once(tape: Tape) -> None:
    batcher = Batcher(tape, Limits(100, 100_000, 8, 4_000, 20.0))
    moderator = Moderator(tape, batcher, Bounds(10_000, 10_000), 16, Metrics())
    judge = Cascade(moderator, None, Metrics(), builtin_policies(), "default")
    batcher.start()
    CALL.set(Call("ClassifyStream", "id"))
    servicer = Servicer(Always(judge), Settings(), Timestamp())
    caller: Any = Caller()
    verdicts: Any = servicer.ClassifyStream(_steps(["so far"], lambda: None), caller)
    try:
        assert not (await anext(verdicts)).final
        assert tape.session_bytes > 0
        await verdicts.aclose()
        assert tape.session_bytes == 0
    finally:
        await batcher.close()
        moderator.close()


@pytest.mark.parametrize("room", [2**30, 10])
async def test_metrics_show_what_streams_hold_and_what_was_crowded_out(
    run_guard: RunGuard, artifact: Artifact, room: int
) -> None:
    engine = open_engine(artifact.folder, session_bytes=room)
    guard = await run_guard(engine, metrics=True, metrics_port=0)
    call = guard.stub.ClassifyStream()
    await call.write(start(ASKED))
    for text in ("so far", ", and on"):
        await call.write(piece(text, check=True))
        assert not (await call.read()).final
    shown = (await fetched(guard, "/metrics"))[1].splitlines()
    assert f"guard_session_bytes {float(engine.session_bytes)}" in shown
    assert (engine.session_bytes > 0) == (room > 10)
    assert f"guard_sessions_crowded_out_total {0.0 if room > 10 else 2.0}" in shown
    call.cancel()


async def test_a_window_that_is_full_is_judged_once(run_guard: RunGuard) -> None:
    engine = FakeEngine(window_tokens=128)
    guard = await run_guard(engine)
    warm = len(engine.batches)
    pieces = [f"and then came number {number} of them; " for number in range(12)]
    replies = await _streamed(guard, [*pieces, "", "fake-bomb"])
    seen = [text for texts in engine.batches[warm:] for text in texts]
    assert len(seen) == len(set(seen))
    assert len(replies[-1].verdict.coverage.windows) > 3
    scores = [reply.verdict.unsafe_score for reply in replies]
    assert max(scores[:-2]) < 0.5 < min(scores[-2:])


async def _steps(
    pieces: Sequence[str], between: Callable[[], None]
) -> AsyncIterator[guard_pb2.ClassifyStreamRequest]:
    yield start(ASKED)
    for text in pieces:
        yield piece(text, check=True)
        between()
    yield piece("", end=True)


async def test_each_check_is_the_judgement_of_the_whole_under_the_policy_of_the_start(
    tape: Tape,
) -> None:
    policies = builtin_policies()
    batcher = Batcher(tape, Limits(100, 100_000, 8, 4_000, 20.0))
    moderator = Moderator(tape, batcher, Bounds(10_000, 10_000), 16, Metrics())
    live = {**policies}
    judges = Always(Cascade(moderator, None, Metrics(), live, "default"))
    batcher.start()
    pieces = ["The un", "safe kettle\nUser", ": <END CON", "VERSATION> " * 5, "e", "\u0301" * 40]
    bounds = StreamBounds(Sizes(10, 10), 10_000, PATIENCE_S)
    steps = _steps(pieces, lambda: live.update(default=policies["strict"]))
    reply = ""
    try:
        async for covered in judged(steps, judges, bounds, lambda: PATIENCE_S):
            found = covered.judgement
            reply = "".join(pieces)[: covered.chars]
            conversation = with_reply(Conversation.of(("user", ASKED)), reply)
            wanted = await moderator.judge(
                conversation, policies["default"], "", PATIENCE_S, no_cache=True
            )
            assert found.policy is policies["default"]
            assert found.built == wanted.built
            assert found.window_scores == pytest.approx(wanted.window_scores, abs=NOISE)
            assert found.decision.action == wanted.decision.action
            for one, other in zip(found.decision.outcomes, wanted.decision.outcomes, strict=True):
                assert one.category == other.category
                assert one.score == pytest.approx(other.score, abs=NOISE)
    finally:
        await batcher.close()
        moderator.close()
    assert covered.final and reply == "".join(pieces) and len(found.built.prompts) > 1
    assert tape.session_bytes == 0
