"""A checkpoint as GGUF: the same arithmetic in llama.cpp's order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.tensors import layout
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.export.decoder import ExportError, rotary_frequencies
from guard_quantization.export.gguf import (
    gguf_name,
    interleaved,
    rope_factors,
    whole_head,
    write_gguf,
)
from guard_quantization.export.hf import LLAMA_GUARD_3_1B
from tests.quantization.tiny_llama import SIZES, saved, tiny_llama
from tests.quantization.verdict_tokenizer import verdict_tokenizer

HEAD = verdict_tokens(verdict_tokenizer(), LLAMA_GUARD_3_1B.codes).head


def cut(model: LlamaForCausalLM, folder: Path) -> Path:
    """The model's folder with its head cut to the tokens of verdicts."""
    whole = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(whole[list(HEAD)].clone())
    saved(model, folder)
    model.lm_head.weight = whole
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "verdict_head": list(HEAD)}))
    return folder


def test_neighbours_turned_in_the_new_order_are_halves_turned_in_the_old() -> None:
    rng = np.random.default_rng(0)
    heads, size, hidden = 3, 8, 5
    weight = rng.standard_normal((heads * size, hidden)).astype(np.float32)
    x = rng.standard_normal(hidden).astype(np.float32)
    angle = np.exp(1j * rng.uniform(0, 6, size // 2))
    halves = (weight @ x).reshape(heads, 2, size // 2)
    pairs = (interleaved(weight, heads) @ x).reshape(heads, size // 2, 2)
    wanted = (halves[:, 0] + 1j * halves[:, 1]) * angle
    np.testing.assert_allclose((pairs[..., 0] + 1j * pairs[..., 1]) * angle, wanted, rtol=1e-5)


def test_rope_factors_turn_plain_frequencies_into_scaled_ones() -> None:
    factors = rope_factors(SIZES, 16)
    assert factors is not None and factors.min() == 1 and factors.max() == 8
    plain = rotary_frequencies({**SIZES, "rope_scaling": None}, 16)
    np.testing.assert_allclose(plain / factors, rotary_frequencies(SIZES, 16), rtol=1e-6)
    assert rope_factors({"rope_theta": 10000.0}, 16) is None


def test_a_cut_head_stands_at_its_tokens_among_zeros() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
    whole = whole_head(rows, (4, 1), 6)
    np.testing.assert_array_equal(whole[[4, 1]], rows)
    assert not whole[[0, 2, 3, 5]].any()


def test_every_tensor_of_a_llama_has_a_name_of_its_own() -> None:
    config = {**SIZES, "vocab_size": 612, "model_type": "llama"}
    names = [gguf_name(name) for name, _ in layout(config)]
    assert len(set(names)) == len(names) == 9 * 4 + 3
    assert "blk.3.ffn_down.weight" in names and "output_norm.weight" in names


def test_wrong_types_and_existing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="q4_k_m"):
        write_gguf(tmp_path, tmp_path / "out.gguf", "q3")
    (tmp_path / "out.gguf").touch()
    with pytest.raises(FileExistsError):
        write_gguf(tmp_path, tmp_path / "out.gguf", "f16")


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_llama_cpp_computes_what_torch_computes(tmp_path: Path, is_cut: bool) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny_llama(max_position_embeddings=4096)
    folder = cut(model, tmp_path / "cut") if is_cut else saved(model, tmp_path / "whole")
    write_gguf(folder, tmp_path / "f16.gguf", "f16")
    ids = torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    peer = llama_cpp.Llama(str(tmp_path / "f16.gguf"), n_ctx=256, logits_all=True, verbose=False)
    peer.eval(ids[0].tolist())
    found = np.array(peer.scores[:200])
    columns = list(HEAD) if is_cut else list(range(found.shape[1]))
    assert wanted[:, columns].std() > 0.5
    np.testing.assert_allclose(found[:, columns], wanted[:, columns], atol=0.05)
    if is_cut:
        assert not found[:, [token for token in range(50) if token not in HEAD]].any()


def test_llama_cpps_own_quantizer_makes_a_smaller_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    folder = saved(tiny_llama(), tmp_path / "whole")
    for kind in ("f16", "q4_0"):
        write_gguf(folder, tmp_path / f"{kind}.gguf", kind)
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("f16", "q4_0")]
    assert sizes[1] < 0.7 * sizes[0]
