"""A tiny seeded Llama as transformers makes it, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.quantization.verdict_tokenizer import verdict_ranks, verdict_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def tiny_llama(**sizes: Any) -> LlamaForCausalLM:
    """Float32, with weights and norms large enough that every part matters."""
    torch.manual_seed(11)
    vocabulary = verdict_tokenizer().get_vocab_size()
    config = LlamaConfig(**{**SIZES, "vocab_size": vocabulary, "initializer_range": 0.15, **sizes})
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5)
    return model


def saved(model: LlamaForCausalLM, folder: Path) -> Path:
    """The folder, in shards and with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.model").write_bytes(verdict_ranks())
    return folder


def random_rows(count: int, vocabulary: int) -> list[list[int]]:
    """Rows of 9 to 30 tokens."""
    rng = torch.Generator().manual_seed(2)
    lengths = torch.randint(9, 31, (count,), generator=rng).tolist()
    return [torch.randint(vocabulary, (size,), generator=rng).tolist() for size in lengths]
