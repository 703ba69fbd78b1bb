"""The student's tokenizer, byte-level BPE in the shape of Llama 3's, and its first embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import BertModel

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


@torch.inference_mode()
def token_vectors(tokenizer: Tokenizer, encoder: BertModel, encoder_tokenizer: Any) -> Tensor:
    """For each token of the student, what the encoder makes of it alone: [N, width], rms about 1.

    The mean of the encoder's output for the token's text, as static embeddings are distilled from
    sentence encoders (Model2Vec, Tulkens and van Dongen, 2024), centred and scaled. Case is
    dropped, as the encoder drops it. Tokens without a text the encoder knows get small noise.
    """
    texts = [tokenizer.decode([at], skip_special_tokens=False) for at in range(_size(tokenizer))]
    unknown = encoder_tokenizer.unk_token_id
    known = [
        at
        for at, text in enumerate(texts)
        if "\ufffd" not in text
        and set(encoder_tokenizer(text, add_special_tokens=False).input_ids) - {unknown}
    ]
    found = []
    for begin in range(0, len(known), 256):
        part = [texts[at].strip() for at in known[begin : begin + 256]]
        batch = encoder_tokenizer(part, padding=True, return_tensors="pt")
        mask = batch.attention_mask.unsqueeze(-1).float()
        hidden = encoder(**batch).last_hidden_state
        found.append((hidden * mask).sum(1) / mask.sum(1))
    vectors = F.normalize(torch.cat(found), dim=-1)
    vectors = vectors - vectors.mean(0)
    noise = torch.Generator().manual_seed(0)
    table = torch.randn(len(texts), vectors.shape[1], generator=noise) * 0.3
    table[known] = vectors / vectors.square().mean().sqrt()
    return table


def _size(tokenizer: Tokenizer) -> int:
    return int(tokenizer.get_vocab_size())
