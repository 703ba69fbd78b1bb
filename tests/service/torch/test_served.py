"""A checkpoint folder behind gRPC: text and images judged, memory that runs out answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.config import Settings
from guard_service.conversation import Picture
from guard_service.engines.torch.engine import TorchEngine
from guard_service.hosted import engines_of
from tests.service.asking import asked, message, refused
from tests.service.conftest import RunGuard
from tests.service.images.drawing import BLUE, RED, encoded, image
from tests.service.torch import reference
from tests.service.torch.prompts import prompt

JUDGED = verdict_pb2.PART_STATE_JUDGED


def pictured(colour: tuple[int, ...]) -> guard_pb2.ClassifyRequest:
    """A user's question about an image of one colour."""
    made = message("What is this?")
    made.parts.add(image=guard_pb2.Image(data=encoded(image(colour))))
    return asked(made)


async def test_folder_as_set_judges_text_and_images_as_transformers_does(
    run_guard: RunGuard, vision_folder: Path
) -> None:
    settings = Settings(model=str(vision_folder), threads=1)
    with engines_of(settings) as (engine, _):
        guard = await run_guard(engine)
        for colour in (RED, BLUE):
            reply = await guard.stub.Classify(pictured(colour))
            assert [part.state for part in reply.verdict.coverage.parts] == [JUDGED, JUDGED]
            shown = Picture("", np.asarray(image(colour)))
            one = prompt(engine, "What is this?", shown=shown)
            wanted = reference.expected(reference.loaded(vision_folder), one)
            assert reply.verdict.unsafe_score == pytest.approx(wanted.unsafe_score, abs=1e-5)
        (info,) = (await guard.stub.GetInfo(guard_pb2.GetInfoRequest())).models
        assert info.judges_images and info.engine == "torch"


async def test_memory_that_runs_out_is_resource_exhausted_and_the_next_call_is_answered(
    run_guard: RunGuard, text: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = await run_guard(text)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: caller's words are not in this")

    with monkeypatch.context() as patch:
        patch.setattr(text._decoder, "run", full)
        refusal = await refused(guard.stub.Classify(asked("hi")))
    assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.reason == "OVERLOADED" and refusal.retry_s
    assert "CUDA" not in refusal.message
    assert 0 < (await guard.stub.Classify(asked("hi"))).verdict.unsafe_score < 1
