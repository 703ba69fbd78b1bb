"""When a growing reply is to be judged: one rule for the guard and for who gives it the text."""

from __future__ import annotations

import re

from guard_policies.schema import Stream

# A mark that ends sentences and white space behind it, quotes and brackets between them let be; or
# a mark of scripts that write no space there; or the end of a line.
_END = re.compile(r"[.!?\u2026\u061f\u06d4\u0964\u0965][\"')\]\u00bb\u2019\u201d]*\s|[。！？｡]|\n")
_BEHIND = 4  # characters of the last piece in which a sentence's end may have begun


class Cadence:
    """Counts one growing text, in code points. `judged` is to be called at each verdict.

    The first verdict is due after `first_check_chars`, the others each `check_every_chars`; with
    `sentence_ends` also where a sentence ends, once as many characters came as for the first.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._most = self._least = min(stream.first_check_chars, stream.check_every_chars)
        self._chars = 0
        self._tail = ""

    def grow(self, text: str) -> bool:
        """Whether a verdict is due, now that this came too."""
        self._chars += len(text)
        ended = False
        if self._stream.sentence_ends:
            ended = _END.search(self._tail + text) is not None
            self._tail = (self._tail + text)[-_BEHIND:] if not ended else ""
        return self._chars >= (self._least if ended else self._most)

    def judged(self) -> None:
        """A verdict covers all of it."""
        self._chars, self._tail = 0, ""
        self._most = self._stream.check_every_chars
