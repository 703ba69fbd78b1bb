"""What is judged: a conversation of messages, each made of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Role(Enum):
    """Author of a message. System and tool messages are input to the wrapped model, as a user's."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Text:
    """Text; may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An image decoded, as a model is shown it. Equal when its digest is."""

    digest: str  # "sha256:..." of the encoded bytes and of the way in which they are shown
    pixels: Any = field(compare=False, repr=False)  # uint8 [height, width, 3], RGB; read-only


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image by value (`data`) or by reference (`uri`).

    Once it is made ready (`guard_service.images`), a model is shown `picture`, and the image in
    `other_views` too where it looks otherwise to other viewers. `unread` says why a model is shown
    nothing of it or, beside a picture, not all of it.
    """

    data: bytes | None = None
    uri: str | None = None
    mime_type: str = ""
    digest: str = ""  # "sha256:..." of the encoded bytes that were decoded
    picture: Picture | None = None
    other_views: tuple[Picture, ...] = ()
    unread: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the wrapped model; `arguments` as the model wrote them."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave back to the wrapped model."""

    text: str
    tool_call_id: str = ""


Part = Text | Image | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def is_response(self) -> bool:
        """Whether the message comes out of the wrapped model."""
        return self.role is Role.ASSISTANT


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; the last one is judged in the light of those before it."""

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, *turns: tuple[str, str]) -> Conversation:
        """Build from (role, text) pairs: `Conversation.of(("user", "hi"), ("assistant", "hi"))`."""
        return cls(tuple(Message(Role(role), (Text(text),)) for role, text in turns))

    @classmethod
    def from_turns(cls, turns: Sequence[dict[str, str]]) -> Conversation:
        """Build from `[{"role": ..., "content": ...}, ...]`, the schema of data files."""
        return cls.of(*((turn["role"], turn["content"]) for turn in turns))
