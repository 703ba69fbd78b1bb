"""Tiny Llamas and Mllamas from a seed, in the folders that transformers itself writes."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from guard_service.templates import BY_NAME
from guard_service.tokenizer import from_ranks
from tests.quantization.verdict_tokenizer import verdict_ranks

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _words() -> list[str]:
    """Those of the templates, as the splitting rule of Llama 3 cuts them."""
    templates = [BY_NAME[name] for name in ("llama-guard-3-11b-vision", "llama-guard-3-8b")]
    pieces = [*templates[0].prefix("User", templates[1].wording), *templates[0].closing("User")]
    text = "\n".join(piece for piece in pieces if isinstance(piece, str))
    return sorted(set(re.findall(r" ?[A-Za-z]{3,}", text)) - {"safe", "unsafe", "User", "Agent"})


def tokenizer(image: bool) -> Tokenizer:
    """Bytes, the words of verdicts and templates, and the special tokens, the image's last."""
    ranks = verdict_ranks()
    first = len(ranks.splitlines())
    more = (
        b"\n%s %d" % (base64.b64encode(word.encode()), first + at)
        for at, word in enumerate(_words())
    )
    return from_ranks(ranks + b"".join(more), image=image)


WORDS = tokenizer(image=False).get_vocab_size()
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 500000.0,
    "rope_scaling": ROPE,
    "pad_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "max_num_tiles": 4,
    "vision_output_dim": 96,
    "intermediate_layers_indices": [0, 2],
    "supported_aspect_ratios": RATIOS,
}


def tiny_llama(**sizes: Any) -> Any:
    """Weights, norms and gates large enough that every part matters."""
    return _lively(LlamaForCausalLM(LlamaConfig(**{**TEXT, **sizes})), seed=5)


def tiny_mllama(**sizes: Any) -> Any:
    """Two of its four layers attend to the image; `sizes` are of text and vision."""
    config = MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1, 3], **sizes},
        vision_config={**VISION, **sizes, "vision_output_dim": 3 * sizes.get("hidden_size", 32)},
        image_token_index=WORDS,
    )
    return _lively(MllamaForConditionalGeneration(config), seed=7)


def _lively(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "gate" in name and weight.dim() == 1:
            weight.data.uniform_(0.5, 1.0)
        elif name.endswith("norm.weight"):
            weight.data.uniform_(0.5, 1.5)
        elif weight.dim() > 1:
            weight.data.normal_(0.0, 0.2)
    return model.eval().requires_grad_(False)


def saved(model: Any, folder: Path, shard: str = "100KB") -> Path:
    """The folder, in shards, with its tokenizer."""
    model.save_pretrained(folder, max_shard_size=shard)
    sees = isinstance(model, MllamaForConditionalGeneration)
    (folder / "tokenizer.json").write_text(tokenizer(sees).to_str(), "utf-8")
    return folder
