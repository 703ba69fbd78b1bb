"""Byte-level BPE tokenizers from hostile files: a tokenizer.json, or a tiktoken rank file."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

_MAX_BYTES = 64 * 2**20
_MAX_TOKEN_BYTES = 512
_PIECE = 2**18  # characters that the library gets at once
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    *(f"reserved_special_token_{number}" for number in range(2, 247)),
)
LLAMA_3_SPECIAL = tuple(f"<|{name}|>" for name in _LLAMA_3_NAMED)


class TokenizerError(ValueError):
    """The file is not a tokenizer that can be used. The text says why."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` (byte-level BPE only) or a rank file (any other name).

    A tokenizer.json is taken only if every text comes back whole from its tokens: all bytes known,
    no normalizer, no unknown token, no dropout, no splitting rule but those of Llama 3 and GPT-2,
    no added token that is not special. Special tokens in a text are read as text from then on.
    """
    content = _read(path)
    return _from_json(content) if path.suffix == ".json" else from_ranks(content)


def from_ranks(content: bytes, image: bool = False) -> Tokenizer:
    """Build the Llama 3 tokenizer from its rank file, special tokens behind the ranks.

    `image` adds `<|image|>` behind those, as the vision release does: 128256.
    """
    ranks = _ranks(content)
    names = {token: _spelling(token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in ranks  # in order of rank
        for cut in _cuts(token, ranks)
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (*LLAMA_3_SPECIAL, *(("<|image|>",) if image else ()))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of text in linear time and bounded memory; raises ValueError for a lone surrogate.

    Longer text goes in pieces: the library holds 300 bytes for a token, and its regex gives up on
    ten million blanks in a row. A piece ends before a space that follows something visible, where
    both splitting rules begin a word anyway; only 2^18 characters without one are cut elsewhere.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, which is no character") from None
    if len(text) <= _PIECE:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = _piece_end(text, start)
        ids += tokenizer.encode(text[start:end], add_special_tokens=False).ids
        start = end
    return ids


def _piece_end(text: str, start: int) -> int:
    end = start + _PIECE
    if end >= len(text):
        return len(text)
    at = text.rfind(" ", start + 1, end)
    while at > start:
        at = start + len(text[start:at].rstrip(" "))
        if at > start and not text[at - 1].isspace():
            return at
        at = text.rfind(" ", start + 1, at)
    return end


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise TokenizerError(f"{path}: larger than {_MAX_BYTES} bytes")
    return content


def _ranks(content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        word, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
        except binascii.Error as error:
            raise TokenizerError(f"line {number} of the ranks: not base64") from error
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise TokenizerError(f"line {number} of the ranks: a token of {len(token)} bytes")
        if rank.strip() != str(len(ranks)).encode():
            raise TokenizerError(f"line {number} of the ranks: rank {len(ranks)} expected")
        if token in ranks:
            raise TokenizerError(f"line {number} of the ranks: the token is there already")
        ranks[token] = len(ranks)
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing:
        raise TokenizerError(f"{missing} of the 256 single bytes have no rank")
    return ranks


def _cuts(token: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Where a token falls into two others, those of the lowest ranks first."""
    cuts = [
        (ranks[token[:cut]], ranks[token[cut:]], cut)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [cut for _, _, cut in sorted(cuts)]


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    letters = {value: chr(value) for value in printable}
    return letters | {value: chr(256 + at) for at, value in enumerate(others)}


_LETTERS = _byte_letters()


def _spelling(token: bytes) -> str:
    return "".join(map(_LETTERS.__getitem__, token))


def _from_json(content: bytes) -> Tokenizer:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError("tokenizer.json is not JSON") from error
    _check(document)
    document["truncation"] = document["padding"] = None
    document["post_processor"] = None
    document["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.json is not a BPE tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _check(document: Any) -> None:
    """Refuse whatever could lose text or let text become a control token."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise TokenizerError("tokenizer.json holds no model")
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError("the tokenizer's model is not BPE")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(
                f"the tokenizer's model sets {key}; texts would not come back whole"
            )
    if model.get("byte_fallback") or document.get("normalizer"):
        raise TokenizerError("the tokenizer is not byte-level, or has a normalizer")
    _check_vocabulary(model["vocab"], document.get("added_tokens") or [])
    if not _known_split(document.get("pre_tokenizer")):
        raise TokenizerError("the tokenizer's splitting rule is neither Llama 3's nor GPT-2's")


def _check_vocabulary(vocabulary: dict[str, Any], added: Any) -> None:
    if not all(type(value) is int and 0 <= value < 2**24 for value in vocabulary.values()):
        raise TokenizerError("a token's id is not a number below 2^24")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise TokenizerError("two tokens share an id")
    if not set(_LETTERS.values()) <= vocabulary.keys():
        raise TokenizerError("the vocabulary lacks single bytes")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise TokenizerError("added_tokens is not a list of tokens")
    for token in added:
        if token.get("special") is not True or not token.get("content"):
            raise TokenizerError("an added token is not special: caller text could become it")


def _known_split(rule: Any) -> bool:
    match rule:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        }:
            return bool(pattern == LLAMA_3_SPLIT)
    return False
