"""The server with the real engine, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard_api.v1 import guard_pb2
from guard_policies.loader import builtin_policies
from guard_service import __main__ as command
from guard_service.config import Settings
from guard_service.conversation import Conversation
from guard_service.engines import EngineFailed, open_engine
from guard_service.engines.onnx import OnnxEngine
from guard_service.server import GuardServer
from tests.service.asking import asked, message
from tests.service.conftest import RunGuard
from tests.service.test_moderation import CUSTOM
from tests.service.tiny_artifact import tiny_artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny artifact."""
    return tiny_artifact(tmp_path / "model").folder


@pytest.fixture
def engine(folder: Path) -> Iterator[OnnxEngine]:
    """Its engine."""
    opened = open_engine(folder)
    assert isinstance(opened, OnnxEngine)
    yield opened
    opened.close()


async def test_verdicts_are_what_the_engine_finds(run_guard: RunGuard, engine: OnnxEngine) -> None:
    guard = await run_guard(engine, (CUSTOM.replace("S20", "S15"),), cache_entries=0)
    (model,) = (await guard.stub.GetInfo(guard_pb2.GetInfoRequest())).models
    assert model.custom_codes == [f"S{number}" for number in range(1, 20)]
    for text in ("hello", "word " * 300):
        built = engine.prompt_builder().build(
            conversation=Conversation.of(("user", text)),
            categories=builtin_policies()["default"].categories,
        )
        found = max(one.assessment.unsafe_score for one in engine.assess(built.prompts))
        verdict = (await guard.stub.Classify(asked(text))).verdict
        assert verdict.unsafe_score == pytest.approx(found, abs=1e-4)
        assert len(verdict.coverage.windows) == len(built.prompts)
        assert verdict.timing.cached_tokens > 0
    verdict = (await guard.stub.Classify(asked("hello", policy="house-rules"))).verdict
    assert [result.code for result in verdict.categories][-1] == "S15"
    reply = (await guard.stub.Classify(asked("hi", message("hello", "assistant")))).verdict
    assert sum(result.score for result in reply.categories) <= reply.unsafe_score + 1e-6


async def test_the_server_does_not_start_when_golden_scores_differ(
    folder: Path, tmp_path: Path
) -> None:
    manifest = json.loads((folder / "guard.json").read_text())
    manifest["golden"][0]["unsafe"] = 1 - manifest["golden"][0]["unsafe"]
    (folder / "guard.json").write_text(json.dumps(manifest))
    engine = open_engine(folder, plan="stored")
    settings = Settings(host=f"unix:{tmp_path / 'socket'}", metrics=False)
    with pytest.raises(EngineFailed, match="golden"):
        await GuardServer(settings, engine, builtin_policies()).start()
    engine.close()


def test_a_corrupted_folder_ends_the_command_with_the_files_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    assert command.main(["--model", str(folder), "--no-metrics"]) == command.FAILED
    told = capsys.readouterr().err
    assert "model.onnx" in told and "Traceback" not in told
