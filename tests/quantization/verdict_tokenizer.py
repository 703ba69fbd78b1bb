"""A tokenizer of bytes and the words of verdicts, in the Llama 3 layout."""

from __future__ import annotations

import base64

from tokenizers import Tokenizer

from guard_service.tokenizer import from_ranks

WORDS = ("sa", "fe", "safe", "un", "unsafe", "\n\n", ",S", "CO", "User", "Agent")


def verdict_ranks() -> bytes:
    """A rank file of 256 bytes, the words of verdicts and the numbers to 99."""
    words = [word.encode() for word in (*WORDS, *map(str, range(10, 100)))]
    tokens = [bytes([value]) for value in range(256)] + words
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    return b"\n".join(lines)


def verdict_tokenizer() -> Tokenizer:
    """Built anew: an engine keeps the one it gets."""
    return from_ranks(verdict_ranks())
