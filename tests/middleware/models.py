"""Backends in process that answer by a script: functions, and objects with the signatures of
llama-cpp-python's and transformers' classes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from tests.middleware.formats.openai_replies import chunks, reply

Messages = list[dict[str, Any]]


class Model:
    """Functions that say the same whatever they are asked, and keep what that was."""

    def __init__(self, said: str, size: int = 7) -> None:
        self.asked: list[Any] = []
        self.closed = 0
        self._pieces = [said[at : at + size] for at in range(0, len(said), size)]

    def whole(self, prompt: Any) -> str:
        self.asked.append(prompt)
        return "".join(self._pieces)

    async def awaited(self, prompt: Any) -> str:
        return self.whole(prompt)

    def stream(self, prompt: Any) -> Iterator[str]:
        self.asked.append(prompt)
        try:
            yield from self._pieces
        finally:
            self.closed += 1

    async def astream(self, prompt: Any) -> AsyncIterator[str]:
        self.asked.append(prompt)
        try:
            for piece in self._pieces:
                yield piece
        finally:
            self.closed += 1


class Llama:
    """Has the signatures of llama_cpp.Llama, and answers in its shapes."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def create_chat_completion(
        self,
        messages: Messages,
        functions: Any = None,
        tools: Any = None,
        temperature: float = 0.2,
        stream: bool = False,
        stop: str | list[str] | None = [],  # noqa: B006  # as it is there
        max_tokens: int | None = None,
        logits_processor: Any = None,
        grammar: Any = None,
    ) -> Any:
        if stream:
            return self._events(messages, "chat")
        return reply(self.model.whole(messages))

    def create_completion(
        self, prompt: str | list[int], suffix: str | None = None, stream: bool = False
    ) -> Any:
        if stream:
            return self._events(prompt, "text")
        text = {"index": 0, "text": self.model.whole(prompt), "logprobs": None}
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m"}
        return {**head, "choices": [{**text, "finish_reason": "stop"}]}

    def __call__(self, prompt: str, suffix: str | None = None, stream: bool = False) -> Any:
        return self.create_completion(prompt, suffix, stream)

    def _events(self, asked: Any, kind: str) -> Iterator[Any]:
        said = "".join(self.model.stream(asked))
        if kind == "chat":
            yield from chunks(said)
            return
        for at in range(0, len(said), 5):
            choice = {"index": 0, "text": said[at : at + 5], "finish_reason": None}
            yield {"id": "cmpl-1", "created": 1, "model": "m", "choices": [choice]}


Llama.__module__ = "llama_cpp.llama"


class TextGenerationPipeline:
    """Has the signature of transformers' pipeline, and answers in its shapes."""

    def __init__(self, said: str) -> None:
        self.asked: list[Any] = []
        self.said = said

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        self.asked.append(text_inputs)
        if isinstance(text_inputs, list) and not isinstance(text_inputs[0], dict):
            return [self._one(one, **kwargs) for one in text_inputs]
        return self._one(text_inputs, **kwargs)

    def _one(self, asked: Any, **kwargs: Any) -> list[dict[str, Any]]:
        said: Any = self.said
        if kwargs.get("return_full_text", True):
            turn = [{"role": "assistant", "content": said}]
            said = asked + (said if isinstance(asked, str) else turn)
        return [{"generated_text": said}] * kwargs.get("num_return_sequences", 1)


TextGenerationPipeline.__module__ = "transformers.pipelines.text_generation"
