"""config.json of a stranger: what it can say, and that nothing in it ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from guard_quantization.checkpoint.streaming import streamed
from guard_quantization.checkpoint.tensors import parameters, read_config, shape_of
from guard_quantization.export.decoder import ExportError
from tests.quantization.tiny_llama import SIZES

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 400,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    **SIZES,
}
ODD: list[Any] = [
    *(None, True, "x", "\ud800", -1, 0, 1.5, 10**30, 1e308, float(2**20)),
    *([], [1, 2], {}, {"a": 1}),
]
ROPE = SIZES["rope_scaling"]


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("field", [*CONFIG, *(f"rope_scaling.{name}" for name in ROPE)])
def test_whatever_a_field_holds_is_taken_or_refused(tmp_path: Path, field: str) -> None:
    outer, _, inner = field.partition(".")
    for odd in ODD:
        value = {**ROPE, inner: odd} if inner else odd
        try:
            config = read_config(written(tmp_path, {**CONFIG, outer: value}))
        except ExportError as error:
            assert str(error).startswith(f"{tmp_path}/config.json: ") and len(str(error)) < 400
            continue
        streamed(config, lambda name: torch.empty(0))
        assert parameters(config) > 0


def test_rope_is_read_as_either_transformers_writes_it(tmp_path: Path) -> None:
    before = shape_of(read_config(written(tmp_path, CONFIG)))
    old = {name: value for name, value in CONFIG.items() if not name.startswith("rope")}
    told = {**ROPE, "rope_theta": CONFIG["rope_theta"]}
    after = read_config(written(tmp_path, {**old, "rope_parameters": told}))
    assert shape_of(after) == before and "rope_parameters" not in after
    plain = {"rope_theta": 500.0, "rope_type": "default"}
    found = shape_of(read_config(written(tmp_path, {**old, "rope_parameters": plain})))
    assert found == shape_of({**old, "rope_theta": 500.0}) != before
