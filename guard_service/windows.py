"""Overlapping windows over a conversation that is longer than a model's window."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence


def overlap_of(size: int) -> int:
    """Tokens that a window shares with the one before it."""
    return size // 4


def spans(
    starts: Sequence[int], heads: Sequence[int], total: int, size: int, tail: int
) -> Iterator[tuple[int, int]]:
    """Token spans `(start, end)` that cover `total` tokens in windows of at most `size`.

    `starts` are the first tokens of the turns, `heads` the length of each turn's label, repeated
    where a window starts inside the turn; `tail` is kept free for the turn end that follows a cut.
    The last window ends with the conversation and is as full as the others. `size` must exceed
    overlap + twice the longest head + tail.
    """
    if total <= size:
        yield 0, total
        return
    start, longest = 0, max(heads)
    while True:
        turn = bisect_right(starts, start) - 1
        if start <= starts[turn] + heads[turn]:
            start = starts[turn]  # inside the label, which it then needs no second time
        head = 0 if starts[turn] == start else heads[turn]
        if total - start <= size - head:
            yield min(start, total - size + longest), total
            return
        end = start + size - head - tail
        yield start, end
        start = end - overlap_of(size)
