"""A checkpoint as a GGUF file for llama.cpp, which guards are measured against.

llama.cpp wants an output row for each token of the vocabulary. Where a checkpoint's head is cut to
the tokens of verdicts, they stand at their ids and all other rows are zeros: such a file is larger
than the weights it is made of, and computes more, than llama.cpp could do with a cut head.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from guard_quantization.checkpoint.tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    Tensors,
    check_tensors,
    layout,
    shape_of,
)
from guard_quantization.export.decoder import ExportError, Shape, rotary_frequencies
from guard_quantization.export.hf import Source, read_source
from guard_quantization.training import Report

Floats = NDArray[np.float32]
TYPES = ("f16", "q4_0", "q4_k_m")
_OUTER = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(source: Path, out: Path, kind: str) -> None:
    """Write a checkpoint folder as one of TYPES; quantized by llama.cpp's own quantizer.

    Holds one tensor at a time. Raises ExportError for a checkpoint that is not a plain Llama or
    libraries that are not installed, FileExistsError when `out` exists.
    """
    if kind not in TYPES:
        raise ExportError(f"type is {kind!r}, must be one of {', '.join(TYPES)}")
    if out.exists():
        raise FileExistsError(f"{out} exists; results are never written over")
    read = read_source(source)
    llama_cpp = None if kind == "f16" else _library("llama_cpp", "peers")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        made = Path(place) / "f16.gguf"
        _write_floats(source, read, made)
        if llama_cpp is not None:
            floats, made = made, Path(place) / f"{kind}.gguf"
            _quantize(llama_cpp, floats, made, kind)
        made.rename(out)


def gguf_name(name: str) -> str:
    """What GGUF calls the tensor that the Hugging Face layout calls `name`."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_INNER[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: Floats, heads: int) -> Floats:
    """A query or key matrix [heads * d, K] for rotary embeddings of neighbours.

    The Hugging Face layout turns row i of a head with row i + d/2; llama.cpp turns 2i with 2i + 1.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    swapped: Floats = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return swapped


def rope_factors(config: Mapping[str, Any], head_dim: int) -> Floats | None:
    """By what each plain rotary frequency is divided; None when nothing is scaled."""
    if not config.get("rope_scaling"):
        return None
    plain = rotary_frequencies({**config, "rope_scaling": None}, head_dim)
    factors: Floats = (plain / rotary_frequencies(config, head_dim)).astype(np.float32)
    return factors


def whole_head(rows: Floats, head: tuple[int, ...], vocab: int) -> Floats:
    """The rows of a cut head at their tokens' ids, zeros elsewhere: [vocab, hidden]."""
    whole = np.zeros((vocab, rows.shape[1]), np.float32)
    whole[list(head)] = rows
    return whole


def _write_floats(source: Path, read: Source, path: Path) -> None:
    gguf = _library("gguf", "peers")
    config, shape = read.config, shape_of(read.config)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config, shape)
    _tokens(writer, gguf.TokenType, read.tokenizer, shape.vocab)
    for name, size in _layout(config, shape):
        kind = np.dtype(np.float16 if len(size) == 2 else np.float32)
        writer.add_tensor_info(name, size, kind, int(np.prod(size)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    count = sum(1 for _ in _layout(config, shape))
    report = Report("writing gguf", count)
    try:
        with Tensors(source) as tensors:
            check_tensors(tensors, config)
            for at, array in enumerate(_arrays(tensors, config, shape), 1):
                writer.write_tensor_data(array)
                report.at(at, "")
    finally:
        report.close()
        writer.close()


def _layout(config: Mapping[str, Any], shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the file, in order."""
    if rope_factors(config, shape.head_dim) is not None:
        yield "rope_freqs.weight", (shape.head_dim // 2,)
    for name, size in layout(config):
        yield gguf_name(name), (shape.vocab, shape.hidden) if name == HEAD else size


def _arrays(tensors: Tensors, config: Mapping[str, Any], shape: Shape) -> Iterator[NDArray[Any]]:
    """The tensors of `_layout`."""
    factors = rope_factors(config, shape.head_dim)
    if factors is not None:
        yield factors
    head = config.get("verdict_head")
    for name, size in layout(config):
        weight = tensors[name]
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, shape.heads)
        if name.endswith("k_proj.weight"):
            weight = interleaved(weight, shape.kv_heads)
        if name == HEAD and head:
            weight = whole_head(weight, tuple(head), shape.vocab)
        yield weight.astype(np.float16) if len(size) == 2 else weight


def _describe(writer: Any, config: Mapping[str, Any], shape: Shape) -> None:
    writer.add_name("random weights" if config.get("random_weights") else "llama guard")
    writer.add_file_type(1)  # float16, except vectors
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))


def _tokens(writer: Any, kinds: Any, tokenizer: Tokenizer, vocab: int) -> None:
    """The vocabulary, as llama.cpp knows Llama 3's; ids without a token are unused ones."""
    model = json.loads(tokenizer.to_str())["model"]
    special = tokenizer.get_added_tokens_decoder()
    by_id = {token: name for name, token in model["vocab"].items()}
    by_id |= {token: added.content for token, added in special.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([by_id.get(token, f"[unused {token}]") for token in range(vocab)])
    writer.add_token_types(
        [
            kinds.CONTROL if token in special
            else kinds.NORMAL if token in by_id
            else kinds.UNUSED
            for token in range(vocab)
        ]
    )  # fmt: skip
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_merges(merges)
    for add, name in (
        (writer.add_bos_token_id, "<|begin_of_text|>"),
        (writer.add_eos_token_id, "<|eot_id|>"),
    ):
        if (token := tokenizer.token_to_id(name)) is not None:
            add(token)


def _quantize(llama_cpp: Any, source: Path, out: Path, kind: str) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    failed = llama_cpp.llama_model_quantize(bytes(source), bytes(out), settings)
    if failed:
        raise ExportError(f"llama.cpp could not quantize to {kind} (status {failed})")


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ExportError(
            f"{module} is not installed: pip install 'llama-guard-service[{extra}]'"
        ) from None
