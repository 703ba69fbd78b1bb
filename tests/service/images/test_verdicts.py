"""Images on the road to a verdict, over real sockets, before a model that sees red."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.engines.fake import FakeEngine
from tests.service.asking import Running, asked
from tests.service.conftest import RunGuard
from tests.service.images.drawing import BLUE, PLAIN, RED, drawn

BLOCK, ALLOW, FLAG = verdict_pb2.ACTION_BLOCK, verdict_pb2.ACTION_ALLOW, verdict_pb2.ACTION_FLAG
FLAGGING = 'name: flagging\nversion: "1"\non_unscannable: flag\n'
PROMPTS_OFF = 'name: prompts-off\nversion: "1"\nprompt: off\n'
Seeing = Callable[..., Awaitable[Running]]


@pytest.fixture
def run_seeing(run_guard: RunGuard) -> Seeing:
    """Starts a guard that sees images."""

    async def run(*policies: str, **knobs: object) -> Running:
        return await run_guard(FakeEngine(sees_images=True), policies=policies, **knobs)

    return run


def shown(*files: bytes | str, text: str = "look") -> guard_pb2.ClassifyRequest:
    """A user's message with a text and images, by value or by address."""
    request = asked(text)
    for file in files:
        given = {"uri": file} if isinstance(file, str) else {"data": file}
        request.conversation.messages[0].parts.add(image=guard_pb2.Image(**given))
    return request


async def verdict(guard: Running, request: guard_pb2.ClassifyRequest) -> verdict_pb2.Verdict:
    reply: guard_pb2.ClassifyResponse = await guard.stub.Classify(request)
    return reply.verdict


@pytest.mark.parametrize("kind", PLAIN)
async def test_what_the_model_sees_decides_in_every_format(run_seeing: Seeing, kind: str) -> None:
    guard = await run_seeing()
    red = await verdict(guard, shown(drawn(RED, kind)))
    assert red.action == BLOCK
    assert [one.code for one in red.categories if one.fired] == ["S9"]
    assert (await verdict(guard, shown(drawn(BLUE, kind)))).action == ALLOW
