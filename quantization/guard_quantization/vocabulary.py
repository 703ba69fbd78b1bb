"""The student's tokenizer: byte-level BPE in the shape of Llama 3's, and embeddings to begin with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from guard_policies.assessment import Direction
from guard_service.templates import BY_NAME, Control
from guard_service.tokenizer import LLAMA_3_SPLIT

_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_WHOLE = 3000  # how often the template's own text is shown, so that its words become single tokens


def train_tokenizer(texts: Iterable[str], size: int, template: str) -> Tokenizer:
    """A tokenizer of `size` tokens, special ones first, with the template's words whole."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_template(texts, template), trainer)
    for text in ("safe", "unsafe", "\n", "S", ",S", *map(str, range(1, 15))):
        if len(tokenizer.encode(text).ids) != 1:
            raise ValueError(f"the verdict word {text!r} is not a single token")
    return tokenizer


def _with_template(texts: Iterable[str], template: str) -> Iterator[str]:
    yield from texts
    parts = ["safe", "unsafe", *map(str, range(1, 15)), "\n", "\n\n", "S", ",S"]
    for direction in Direction:
        label = BY_NAME[template].label(direction)
        pieces = BY_NAME[template].prefix(label, {}) + BY_NAME[template].closing(label)
        parts += [f"{label}:", *(piece for piece in pieces if not isinstance(piece, Control))]
    for _ in range(_WHOLE):
        yield from parts


def word_vectors(tokenizer: Tokenizer, encoder_tokenizer: Any, words: Tensor) -> Tensor:
    """For each token of the student, a word vector [N, width] of the encoder's table `words`.

    A token that begins with a space is the start of a word; one without may also go on with one, so
    the encoder's continuation piece has a say. Case is dropped, as the encoder drops it.
    """
    vocabulary = encoder_tokenizer.get_vocab()
    mean = words.mean(0)
    vectors = torch.empty(tokenizer.get_vocab_size(), words.shape[1])
    for token in range(len(vectors)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        pieces = [] if "\ufffd" in text else _pieces(text, encoder_tokenizer)
        found = words[pieces].mean(0) if pieces else mean
        onward = vocabulary.get(f"##{text.lower()}")
        if onward is not None and text[:1].isalpha():
            found = words[onward] if not pieces or len(pieces) > 1 else (found + words[onward]) / 2
        vectors[token] = found
    vectors[tokenizer.token_to_id("<|begin_of_text|>")] = words[encoder_tokenizer.cls_token_id]
    for name in _SPECIAL[1:]:
        vectors[tokenizer.token_to_id(name)] = words[encoder_tokenizer.sep_token_id]
    return vectors


def _pieces(text: str, encoder_tokenizer: Any) -> list[int]:
    ids: list[int] = encoder_tokenizer(text, add_special_tokens=False).input_ids
    return [token for token in ids if token != encoder_tokenizer.unk_token_id]
