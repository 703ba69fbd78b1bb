"""How the published chat templates read messages, hazards included: for parity, not for serving."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from guard_service.templates import Template, line

ChatMessage = Mapping[str, object]  # {"role": str, "content": str or a list of typed parts}


class ChatTemplateError(ValueError):
    """The published template raises for these messages. The text names no content."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a published template makes of a list of messages."""

    target: str  # label of the judged side
    lines: tuple[str, ...]
    image: bool
    wording: Mapping[str, str]  # of the categories, by code


def read(
    template: Template,
    messages: Sequence[ChatMessage],
    categories: Mapping[str, str] | None = None,
    excluded: Collection[str] = (),
) -> Reading:
    """Read messages as the template's publisher does; ChatTemplateError where that raises.

    The published text has its hazards, kept here: the 1B and 11B templates lose plain-string
    content, give each text part a line of its own, and write one image token for any number of
    images, on the text-only model too; the judged side follows from the number of messages.
    """
    listed = template.wording if categories is None else categories
    wording = {code: text for code, text in listed.items() if code not in excluded}
    if template.merges_parts:
        return _stack(template, messages, wording)
    target = template.labels["assistant" if len(messages) % 2 == 0 else "user"]
    lines = []
    for index, message in enumerate(messages):
        if (message["role"] == "user") != (index % 2 == 0):
            raise ChatTemplateError("conversation roles must alternate, beginning with the user")
        label = template.labels.get(str(message["role"]), target)
        lines += [line(label, text.strip()) for text in _texts(template, message["content"])]
    image = any(_of_type(message["content"], "image") for message in messages)
    return Reading(target, tuple(lines), image, wording)


def _texts(template: Template, content: object) -> list[str]:
    if template.reads_strings:
        if not isinstance(content, str):
            raise ChatTemplateError("this template takes plain strings only")
        return [content]
    return [str(part.get("text", "")) for part in _of_type(content, "text")]


def _of_type(content: object, kind: str) -> list[Mapping[str, object]]:
    if isinstance(content, str):
        return []
    if not isinstance(content, Sequence):
        raise ChatTemplateError("content is neither a string nor a list of parts")
    return [part for part in content if isinstance(part, Mapping) and part.get("type") == kind]


def _stack(
    template: Template, messages: Sequence[ChatMessage], wording: Mapping[str, str]
) -> Reading:
    """Llama Stack: one line for each message, under its role's name; nothing need alternate."""
    if not messages:
        raise ChatTemplateError("no messages")
    labels = [str(message["role"]).capitalize() for message in messages]
    texts = [_flat(message["content"]) for message in messages]
    lines = tuple(line(label, text) for label, text in zip(labels, texts, strict=True))
    image = any(_of_type(message["content"], "image") for message in messages)
    return Reading(labels[-1], lines, image, wording)


def _flat(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ChatTemplateError("content is neither a string nor a list of parts")
    return " ".join(
        str(part.get("text", "")) if part.get("type") == "text" else "<image>" for part in content
    )
