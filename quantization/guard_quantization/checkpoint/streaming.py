"""A transformers Llama whose layers take their weights from somewhere else while they run.

So a model is measured with the memory of one layer in float32, whatever its size, and before it is
written: `read` may cut what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from guard_quantization.checkpoint.tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    Tensors,
    check_tensors,
    read_config,
    shape_of,
)

_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id"),
)


def streamed(config: Mapping[str, Any], read: Callable[[str], Tensor]) -> LlamaForCausalLM:
    """A Llama that computes in float32 and holds the weights of the layer that is running.

    `read` gives tensors by name, in the numbering of `config`; each layer's are read anew for every
    batch. The output layer is left out: use `model.model` and the rows that you want.
    """
    model = _hollow(config)
    model.model.embed_tokens.weight = _frozen(read(EMBEDDING))
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, found: found.float())
    model.model.norm.weight = _frozen(read(NORM).float())
    for at, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(partial(_fill, read, f"model.layers.{at}."))
        layer.register_forward_hook(_empty, always_call=True)
    return model


def load_llama(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The whole model of a checked checkpoint folder, in memory, ready to be trained.

    As `from_pretrained`, except that the output layer has only the rows of `verdict_head` where
    config.json has one. Raises ExportError.
    """
    config = read_config(folder)
    tensors = Tensors(folder)
    with tensors:
        entries = check_tensors(tensors, config)
        model = _hollow(config)
        state = {entry.name: tensors.read(entry.name).to(dtype, copy=True) for entry in entries}
    tied = shape_of(config).tied
    if tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.requires_grad_(True)
    return model


def _hollow(config: Mapping[str, Any]) -> LlamaForCausalLM:
    """The modules without weights. Only known fields are taken from `config`."""
    fields = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    known = LlamaConfig(**fields, tie_word_embeddings=False, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(known)
        if head := config.get("verdict_head"):
            model.lm_head = nn.Linear(known.hidden_size, len(head), bias=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(known)
    return model.eval()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _fill(read: Callable[[str], Tensor], prefix: str, layer: nn.Module, inputs: Any) -> None:
    state = {name: read(prefix + name).float() for name, _ in layer.named_parameters()}
    layer.load_state_dict(state, assign=True)


def _empty(layer: nn.Module, inputs: Any, found: Any) -> None:
    layer.to("meta")
