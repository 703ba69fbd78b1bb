"""A seeded Llama of a few thousand weights as an artifact: built, never committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard_quantization.export.artifact import Release, make_artifact, verdict_tokens
from guard_quantization.export.decoder import Precision
from guard_service.artifact import Artifact
from tests.quantization.verdict_tokenizer import verdict_tokenizer

CODES = tuple(f"S{number}" for number in range(1, 15))
RELEASE = Release(
    name="tiny",
    template="compact",
    window_tokens=256,
    categories=CODES,
    custom_categories=True,
    codes=tuple(f"S{number}" for number in range(1, 20)),
    licence="Apache-2.0",
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": verdict_tokenizer().get_vocab_size(),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


def tiny_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights under their Hugging Face names; the head is cut to the verdict tokens."""
    rng = np.random.default_rng(seed)
    wide, narrow, hidden, mlp = 64, 32, 64, 96
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden)}
    shapes["lm_head"] = (len(verdict_tokens(verdict_tokenizer(), RELEASE.codes).head), hidden)
    weights = {"model.norm.weight": np.ones(hidden, np.float32)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow), ("o", hidden)):
            shapes[f"{at}.self_attn.{name}_proj"] = (rows, wide if name == "o" else hidden)
        for name, shape in (
            ("gate", (mlp, hidden)),
            ("up", (mlp, hidden)),
            ("down", (hidden, mlp)),
        ):
            shapes[f"{at}.mlp.{name}_proj"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = np.ones(hidden, np.float32)
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = (0.15 * rng.standard_normal(shape)).astype(np.float32)
    return weights


def tiny_artifact(
    folder: Path,
    release: Release = RELEASE,
    weights: dict[str, NDArray[np.float32]] | None = None,
    precision: Precision | None = None,
) -> Artifact:
    """Make the artifact folder."""
    precision = precision or Precision(bits=8, block=32, embedding_bits=8)
    weights = weights or tiny_weights()
    tokenizer = verdict_tokenizer()
    return make_artifact(folder, CONFIG, weights, tokenizer, release, precision, head_is_cut=True)
