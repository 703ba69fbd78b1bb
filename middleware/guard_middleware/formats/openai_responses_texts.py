"""Every text of a Response object and of the events that build one, each with its path in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from guard_middleware.formats import fields, openai
from guard_middleware.formats.contract import Unreadable
from guard_middleware.strict_json import Json

_STRUCTURE = fields.names(
    """
    type id item_id call_id approval_request_id container_id file_id role status phase object index
    start_index end_index exit_code created_by execution namespace server_label
    """
)
_KNOWN = fields.names(
    """
    content text refusal summary arguments name input output code action annotations logprobs
    encrypted_content url title filename queries query results error message tools description
    command commands stdout stderr delta part
    """
)
_RESPONSE_STRUCTURE = fields.names(
    """
    id object created_at completed_at status background model parallel_tool_calls temperature top_p
    max_output_tokens max_tool_calls previous_response_id service_tier store truncation usage
    incomplete_details top_logprobs presence_penalty frequency_penalty conversation
    prompt_cache_retention kv_transfer_params tool_usage
    """
)
# What a response repeats of the request.
ECHOES = fields.names(
    """
    instructions tools tool_choice text metadata user safety_identifier prompt_cache_key reasoning
    """
)
_EVENT_STRUCTURE = fields.names(
    """
    type sequence_number output_index content_index summary_index annotation_index item_id
    obfuscation param timings prompt_progress
    """
)
_LIFECYCLE = fields.names("created queued in_progress completed incomplete failed cancelled")
ENDS = frozenset(f"response.{one}" for one in ("completed", "incomplete", "failed", "cancelled"))


class Place(NamedTuple):
    """Where a text grows in an item: a list of parts, or none; the key; the type of its part."""

    group: str
    key: str
    type: str


TEXTS = {
    "response.output_text": Place("content", "text", "output_text"),
    "response.refusal": Place("content", "refusal", "refusal"),
    "response.reasoning_text": Place("content", "text", "reasoning_text"),
    "response.reasoning_summary_text": Place("summary", "text", "summary_text"),
    "response.function_call_arguments": Place("", "arguments", ""),
    "response.mcp_call_arguments": Place("", "arguments", ""),
    "response.custom_tool_call_input": Place("", "input", ""),
    "response.code_interpreter_call_code": Place("", "code", ""),
}
PARTS = {
    "response.content_part": "content",
    "response.reasoning_part": "content",
    "response.reasoning_summary_part": "summary",
}


class Found(NamedTuple):
    """A text. One that is `whole` stands for all that is said at its path; others add to it."""

    path: str
    text: str
    whole: bool = True


def response_texts(response: Mapping[str, Any], own: frozenset[str]) -> Iterator[Found]:
    """Texts of a Response; what it repeats of the request's `own` strings is left out."""
    for index, item in enumerate(fields.array(response.get("output"), "output")):
        yield from _texts(fields.obj(item, "output[]"), f"output[{index}]")
    rest = {key: value for key, value in response.items() if key != "output"}
    for key, value in fields.others(rest, _RESPONSE_STRUCTURE).items():
        if key in ECHOES:
            said = [one for one in strings(value) if one not in own and not fields.plain(one)]
            yield Found(f"response.{key}", "\n".join(said))
        else:
            yield from _texts({key: value}, "response")


def event_texts(
    kind: str, event: Mapping[str, Any], output: int, own: frozenset[str]
) -> Iterator[Found]:
    """Texts of one event of a stream that is about the item number `output`."""
    if kind.startswith("response.audio.") or "partial_image" in kind:
        raise Unreadable("audio or an image in a reply cannot be judged")
    stem, _, stage = kind.rpartition(".")
    item = f"output[{output}]"
    read: set[str] = set()
    if stem == "response" and stage in _LIFECYCLE:
        read = {"response"}
        yield from response_texts(fields.obj(event.get("response"), "response"), own)
    elif stem == "response.output_item" and stage in ("added", "done"):
        read = {"item"}
        yield from _texts(fields.obj(event.get("item"), "item"), item)
    elif stem in PARTS and stage in ("added", "done"):
        read = {"part"}
        part = fields.obj(event.get("part"), "part")
        yield from _texts(part, part_path(output, PARTS[stem], event))
    elif stem in TEXTS and stage in ("delta", "done"):
        place = TEXTS[stem]
        read = {"delta" if stage == "delta" else place.key, "logprobs"}
        yield from _growth(event, part_path(output, place.group, event), place, stage == "done")
    rest = {key: value for key, value in event.items() if key not in read}
    for found in _texts(fields.others(rest, _EVENT_STRUCTURE), f"{item}.{kind}"):
        yield found._replace(whole=False)


def part_path(output: int, group: str, event: Mapping[str, Any]) -> str:
    """The path of the part, or of the item, that an event is about."""
    item = f"output[{output}]"
    return f"{item}.{group}[{part_index(group, event)}]" if group else item


def part_index(group: str, event: Mapping[str, Any]) -> int:
    """The number of the part that an event is about."""
    return fields.count(event.get(f"{group}_index"), f"{group}_index", 0, 1023)


def strings(value: Json) -> Iterator[str]:
    """All strings of a value, keys too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def _growth(event: Mapping[str, Any], path: str, place: Place, whole: bool) -> Iterator[Found]:
    key = place.key if whole else "delta"
    said = fields.text(event.get(key), key)
    yield Found(f"{path}.{place.key}", said, whole)
    for found in _logprobs(event.get("logprobs"), said, path):
        yield found._replace(whole=whole)


def _texts(value: Json, path: str) -> Iterator[Found]:
    if isinstance(value, dict):
        if value.get("type") in ("image_generation_call", "output_audio", "audio"):
            raise Unreadable("audio or an image in a reply cannot be judged")
        rest = fields.others(value, _STRUCTURE)
        if unknown := [key for key in rest if key not in _KNOWN]:
            yield Found(f"{path}{{}}", " ".join(unknown) + "\n")
        for key, inner in rest.items():
            if key == "logprobs":
                yield from _logprobs(inner, value.get("text"), path)
            else:
                yield from _texts(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{path}[{index}]")
    elif isinstance(value, str):
        fields.no_data(value)
        yield Found(path, value)


def _logprobs(listed: object, text: object, path: str) -> Iterator[Found]:
    if listed:
        for piece in openai.logprob_pieces({"content": listed}, {"content": text}, 0):
            yield Found(f"{path}.{piece.channel.name}", piece.text)
