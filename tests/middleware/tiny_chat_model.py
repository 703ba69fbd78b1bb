"""A tiny random Llama that chats, with a tokenizer of bytes: built, never committed."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_chat_model() -> tuple[Any, Any]:
    """The model and its tokenizer; it writes letters, the same ones every time."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*alphabet, "<s>", "</s>"])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        model_input_names=["input_ids", "attention_mask"],
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"],
            pad_token_id=vocabulary["</s>"],
        )
    ).eval()
    _letters_only(model, {vocabulary[chr(one)] for one in range(ord("a"), ord("z") + 1)})
    return model, tokenizer


def _letters_only(model: Any, letters: set[int]) -> None:
    """Every other token gets a score of nothing, and letters one above it."""
    head = model.lm_head.weight.data
    keep = torch.zeros(head.shape[0], 1)
    keep[sorted(letters)] = 1.0
    head.copy_(head * keep)
