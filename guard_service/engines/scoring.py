"""What every engine that reads a Llama Guard does alike: which tokens it reads, and what they say.

Behind a prompt's closing go, unasked, the tokens `unsafe`, newline and `S`. The logits before
`unsafe` give P(unsafe) over {safe, unsafe}, calibrated; those behind `S` give the distribution over
the codes that the prompt lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guard_policies.assessment import Assessment, Direction
from guard_service.engines import EngineFailed
from guard_service.manifest import Calibration, Verdict
from guard_service.prompt import Prompt
from guard_service.tokenizer import TokenizerError

_BATCH_TOKENS = 2048  # of one run, padding included: bounds memory
_PADDING_SHARE = 0.2  # of a run's tokens, at most


class Scoring:
    """How the verdicts of one model are read."""

    def __init__(
        self, verdict: Verdict, calibration: Mapping[Direction, Calibration], most_positions: int
    ) -> None:
        self.spoken = (verdict.unsafe, verdict.newline, verdict.mark)
        self._verdict = verdict
        self._calibration = calibration
        self._most = most_positions
        self._column = {token: at for at, token in enumerate(verdict.head)}

    def check(self, prompt: Prompt) -> None:
        """Raises EngineFailed for a prompt too long, or with a category that has no code."""
        length = len(prompt.prefix) + len(prompt.body) + len(prompt.closing) + len(self.spoken)
        if length > self._most:
            raise EngineFailed(f"a prompt of {length} tokens; the model takes {self._most}")
        if not prompt.categories or not set(prompt.categories) <= self._verdict.codes.keys():
            raise EngineFailed("the prompt lists a category that the model has no code for")

    def assessment(self, prompt: Prompt, logits: NDArray[np.float32]) -> Assessment:
        """What logits [2, head] say: at the last token of the closing, and at `S`."""
        verdict, first = self._verdict, logits[0].astype(np.float64)
        margin = float(first[self._column[verdict.unsafe]] - first[self._column[verdict.safe]])
        unsafe = self._calibration[prompt.direction].probability(margin)
        columns = [self._column[verdict.codes[code]] for code in prompt.categories]
        behind = logits[1].astype(np.float64)[columns]
        shares = np.exp(behind - behind.max())
        shares *= unsafe / shares.sum()
        return Assessment(unsafe, dict(zip(prompt.categories, shares.tolist(), strict=True)))


def verdict_tokens(tokenizer: Tokenizer, codes: Sequence[str]) -> Verdict:
    """The tokens that verdicts over these codes are made of; `head` is in a fixed order.

    Raises TokenizerError when a verdict's words are not one token each.
    """

    def single(text: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise TokenizerError(f"the tokenizer has no single token for {text!r}")
        return int(ids[0])

    numbers = {code: single(code[1:]) for code in codes}
    words = {text: single(text) for text in ("safe", "unsafe", "\n", "\n\n", "S", ",S")}
    for code, number in numbers.items():
        whole = tokenizer.encode(f"unsafe\n{code}", add_special_tokens=False).ids
        if whole != [words["unsafe"], words["\n"], words["S"], number]:
            raise TokenizerError(f"the tokenizer does not read a verdict of {code} as four tokens")
    end = tokenizer.token_to_id("<|eot_id|>")
    if end is None:
        raise TokenizerError("the tokenizer has no <|eot_id|>")
    return Verdict(
        head=(*words.values(), *numbers.values(), end),
        safe=words["safe"],
        unsafe=words["unsafe"],
        newline=words["\n"],
        mark=words["S"],
        codes=numbers,
    )


def alike(rows: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Rows of like length together: few tokens of padding, no run too large."""
    batch: list[int] = []
    used = longest = 0
    for at in sorted(rows, key=lambda at: -len(rows[at])):
        length = len(rows[at])
        whole = longest * (len(batch) + 1)
        padded = whole - used - length > _PADDING_SHARE * whole
        if batch and (whole > _BATCH_TOKENS or padded):
            yield batch
            batch, used = [], 0
        longest = length if not batch else longest
        batch.append(at)
        used += length
    if batch:
        yield batch
