"""Overlapping windows over a conversation that is longer than a model's window."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence


def overlap_of(size: int) -> int:
    """Tokens that a window shares with the one before it: what is no longer lies whole in one.

    A share s makes a growing text cost 1 / (1 - s) of its tokens. On long texts, a quarter, a fifth
    and a sixth were not told apart by how well the starter guard judged.
    """
    return size // 6


def spans(
    starts: Sequence[int], heads: Sequence[int], total: int, size: int, tail: int
) -> Iterator[tuple[int, int]]:
    """Token spans `(start, end)` that cover `total` tokens in windows of at most `size`.

    `starts` are the first tokens of the turns, `heads` the length of each turn's label, repeated
    where a window starts inside the turn; `tail` is kept free for the turn end that follows a cut.
    `size` must exceed overlap + twice the longest head + tail.

    While the last turn grows, all windows but the last stay as they are: where one starts depends
    on what stands before it. The last turn begins with at least half a window of what it answers.
    """
    if total <= size:
        yield 0, total
        return

    def placed(start: int) -> tuple[int, int]:
        """Where a window starts that is to start here, and the length of its label."""
        turn = bisect_right(starts, start) - 1
        if start <= starts[turn] + heads[turn]:
            return starts[turn], 0  # with the label that stands there
        return start, heads[turn]

    context, _ = placed(max(starts[-1] - size // 2, 0))
    start, head = 0, 0
    while True:
        if total - start <= size - head:
            yield start, total
            return
        end = start + size - head - tail
        yield start, end
        after = end - overlap_of(size)
        start, head = placed(min(after, context) if start < context else after)
