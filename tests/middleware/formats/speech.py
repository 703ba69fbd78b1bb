"""What a protocol's test file teaches the tests that hold every format to the same promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from guard_middleware.formats.contract import Format


class Said(NamedTuple):
    """Whose text: a choice, and one of the speech's channels."""

    choice: int
    channel: str


class Speech(Protocol):
    """Speaks and hears one protocol, as its backends and its clients do."""

    @property
    def format(self) -> Format: ...

    @property
    def path(self) -> str:
        """Of whole requests."""
        ...

    @property
    def stream_path(self) -> str:
        """Of streamed requests; often the same."""
        ...

    @property
    def stream_type(self) -> str:
        """Content type of streams."""
        ...

    @property
    def channels(self) -> Sequence[str]:
        """Every kind of text that its replies carry: "content", "reasoning", "arguments", ..."""
        ...

    @property
    def most_choices(self) -> int: ...

    def request(self, said: str, stream: bool, choices: int = 1) -> object:
        """A request's JSON with one turn of the user."""
        ...

    def whole(self, said: Mapping[Said, str]) -> bytes:
        """A reply that says all this; texts are never empty."""
        ...

    def events(self, pieces: Sequence[tuple[Said, str]]) -> list[bytes]:
        """The chunks of a stream that says these pieces one after the other, and its end. Pieces of
        one `Said` may be split anywhere, also between two code points."""
        ...

    def heard(self, body: bytes, streamed: bool) -> Mapping[Said, str]:
        """What a client reads, a refusal's text too; raises AssertionError for what is not
        well-formed to its end."""
        ...

    def refused(self, body: bytes, streamed: bool) -> bool:
        """Whether the client is told that the reply was filtered."""
        ...
