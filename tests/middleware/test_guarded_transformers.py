"""guarded() around a real transformers pipeline, on a tiny random Llama."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from transformers import pipeline

from guard_middleware import guarded
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, text_of
from guard_policies.assessment import Action
from tests.middleware.tiny_chat_model import tiny_chat_model

CHAT = [{"role": "user", "content": "Hi"}]
KNOBS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def raw() -> Any:
    model, tokenizer = tiny_chat_model()
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def screened(raw: Any, guard: FakeGuard) -> Any:
    return guarded(raw, guard, metrics=Metrics(CollectorRegistry()), refusal="No.")


@pytest.mark.parametrize("asked", ["Hi", ["Hi", "Ho"], CHAT, [CHAT, CHAT]], ids=str)
@pytest.mark.parametrize("more", [{}, {"return_full_text": False}], ids=str)
def test_allowed_reply_is_the_pipelines(raw: Any, asked: Any, more: dict[str, Any]) -> None:
    assert screened(raw, FakeGuard())(asked, **KNOBS, **more) == raw(asked, **KNOBS, **more)


@pytest.mark.parametrize("asked", ["Hi", CHAT], ids=str)
def test_what_was_generated_is_what_is_judged(raw: Any, asked: Any) -> None:
    guard = FakeGuard()
    said = raw(asked, **KNOBS, return_full_text=False)[0]["generated_text"]
    screened(raw, guard)(asked, **KNOBS)
    judged = [[text_of(one.parts[0]) for one in asked.messages] for asked in guard.asked]
    assert said and judged == [["Hi"], ["Hi", said]]


@pytest.mark.parametrize("asked", ["Hi", ["Hi", "Ho"], CHAT, [CHAT, CHAT]], ids=str)
@pytest.mark.parametrize("more", [{}, {"return_full_text": False}], ids=str)
def test_refusals_have_the_shape_of_replies(raw: Any, asked: Any, more: dict[str, Any]) -> None:
    def judge(text: str) -> Action:
        return Action.ALLOW if text in ("Hi", "Ho") else Action.BLOCK

    got = screened(raw, FakeGuard(judge))(asked, **KNOBS, **more)
    own = raw(asked, **KNOBS, **more)
    assert shape(got) == shape(own) and got != own and "No." in str(got)


def shape(value: Any) -> Any:
    """Types and keys, without the texts."""
    if isinstance(value, list):
        return [shape(one) for one in value]
    return (
        {key: shape(one) for key, one in value.items()} if isinstance(value, dict) else type(value)
    )


def test_other_tasks_are_refused() -> None:
    model, tokenizer = tiny_chat_model()
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="FeatureExtractionPipeline"):
        guarded(features, FakeGuard(), metrics=Metrics(CollectorRegistry()))
