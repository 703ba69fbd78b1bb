"""Two guards of known behaviour: what each finds in a text stands in the text."""

from __future__ import annotations

import re
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from guard_api.v1 import guard_pb2
from guard_policies.assessment import Assessment
from guard_service.engines import Assessed
from guard_service.engines.fake import CODES, FakeEngine
from guard_service.prompt import Prompt, PromptBuilder

SMALL, LARGE = "small", "large"


def says(small: float, large: float, small_code: str = "S1", large_code: str = "S1") -> str:
    """A text of which each guard finds P(unsafe), all of it in one category."""
    return f"{SMALL}={small}/{small_code} {LARGE}={large}/{large_code}"


class Told(FakeEngine):
    """Finds what the text says of it; without a word of it nothing. `gate` holds its runs back."""

    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(**more)
        self.card = replace(self.card, name=name, digest=f"sha256:{name}")
        self.gate = threading.Event()
        self.gate.set()
        self.before_run = self._wait

    def saw(self, text: str) -> int:
        """In how many prompts a text was."""
        return sum(text in prompt for batch in self.batches for prompt in batch)

    def _wait(self, texts: Sequence[str]) -> None:
        self.gate.wait(20)

    def _assessed(self, prompt: Prompt, text: str) -> Assessed:
        found = re.findall(rf"{self.card.name}=([0-9.e-]+)/(S\d+)", text)
        score, code = (float(found[-1][0]), found[-1][1]) if found else (0.0, "S1")
        scores = dict.fromkeys(CODES, 0.0) | {code: score}
        return Assessed(Assessment(score, scores), len(prompt.body), 0)


class Seeing(Told):
    """The same for a guard that sees images."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        template = "llama-guard-3-11b-vision"
        self.card = replace(self.card, judges_images=True, template=template)
        self._builder = PromptBuilder(self._tokenizer, template, self.card.window_tokens)


def picture() -> guard_pb2.Part:
    """A part that is a small grey PNG."""
    side = 16

    def chunk(kind: bytes, data: bytes) -> bytes:
        ends = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + ends

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * side) * side)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return guard_pb2.Part(image=guard_pb2.Image(data=data, mime_type="image/png"))


def with_picture(text: str) -> guard_pb2.Message:
    """The user's text and a picture."""
    return guard_pb2.Message(role=guard_pb2.ROLE_USER, parts=[guard_pb2.Part(text=text), picture()])
