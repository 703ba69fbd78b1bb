"""OpenAI's /v1/responses, as vLLM, llama.cpp, Ollama and Llama Stack speak it.

A conversation that the backend keeps is one that the guard cannot see: `previous_response_id`,
`conversation`, stored prompts and references to items are refused, and so is `background`, whose
reply would be fetched by other requests. Those (GET /v1/responses/...) are known to no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guard_middleware.formats import fields, openai
from guard_middleware.formats.contract import (
    Answer,
    Asked,
    Channel,
    Piece,
    Refusal,
    ReplyStream,
    Turn,
    Unreadable,
)
from guard_middleware.formats.openai_responses_input import read_input
from guard_middleware.formats.openai_responses_stream import (
    ResponsesStream,
    incomplete,
    new_head,
    new_message,
)
from guard_middleware.formats.openai_responses_texts import ECHOES, response_texts, strings
from guard_middleware.strict_json import Json, dump

_CONTROLS = openai.CONTROLS | fields.names(
    """
    background include max_output_tokens max_tool_calls reasoning text tool_choice truncation
    prompt_cache_retention prompt_cache_options
    """
)
_READ = openai.LABELS | {"input", "instructions"}
_UNJUDGEABLE = openai.UNJUDGEABLE | fields.names(
    """
    conversation prompt context_management previous_input_messages background_options
    """
)
# What backends run by themselves puts texts before the model that the guard has not seen.
_CLIENT_TOOLS = ("function", "custom")


@dataclass(frozen=True, slots=True)
class ResponsesAsked(Asked):
    """With the strings that the reply will repeat."""

    own: frozenset[str] = frozenset()


class OpenAIResponses:
    """Responses."""

    name = "openai-responses"
    paths = ("/**/responses",)
    stream_types = ("text/event-stream",)

    def read_request(self, path: str, body: Json) -> Asked:
        """What is asked."""
        asked = fields.obj(body, "the body", _CONTROLS | _READ | _UNJUDGEABLE | {"tools"})
        fields.refuse_keys(asked, _UNJUDGEABLE)
        if fields.flag(asked.get("background"), "background"):
            raise Unreadable("background asks for a reply that the guard would not see")
        unread: list[str] = []
        turns = read_input(asked.get("input"), unread)
        if instructions := fields.text(asked.get("instructions"), "instructions"):
            turns.insert(0, Turn({"role": "system", "content": instructions}))
        for index, one in enumerate(fields.array(asked.get("tools"), "tools")):
            tool = fields.obj(one, f"tools[{index}]")
            if tool.get("type", "function") not in _CLIENT_TOOLS:
                unread.append(f"tools[{index}]")
        extra = fields.extra_turns(asked, _READ, _CONTROLS)
        return ResponsesAsked(
            prompts=((*extra, *turns),),
            streams=fields.flag(asked.get("stream"), "stream"),
            model=fields.text(asked.get("model"), "model"),
            unread=tuple(unread),
            own=frozenset(strings({key: asked[key] for key in ECHOES if key in asked})),
        )

    def without(self, body: Json, places: frozenset[int]) -> Json:
        """The body without these items."""
        return fields.without(body, "input", places)

    def read_reply(self, asked: Asked, body: Json) -> Sequence[Piece]:
        """Every text of a whole reply."""
        found = response_texts(fields.obj(body, "the reply"), own_strings(asked))
        return tuple(Piece(Channel(0, path), text) for path, text, _ in found if text)

    def open_stream(self, asked: Asked, content_type: str) -> ReplyStream:
        """A reader for one streamed reply."""
        return ResponsesStream(asked, own_strings(asked))

    def refuse(self, asked: Asked, refusal: Refusal) -> Answer:
        """An incomplete response, for reasons of a content filter."""
        if asked.streams:
            events = ResponsesStream(asked, frozenset()).refuse(refusal)
            return Answer(200, "text/event-stream; charset=utf-8", events)
        head = new_head(asked, refusal)
        body = incomplete(head, [new_message(refusal, refusal.text)])
        return Answer(200, "application/json", dump(body))

    def error(self, status: int, code: str, message: str) -> Answer:
        """OpenAI's error object."""
        return openai.error(status, code, message)


def own_strings(asked: Asked) -> frozenset[str]:
    """What a reply may repeat: the client said it in this very request."""
    return asked.own if isinstance(asked, ResponsesAsked) else frozenset()
