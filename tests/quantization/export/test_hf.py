"""A Hugging Face folder becomes an artifact that answers as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.checkpoint.tensors import Tensors, stored_bytes
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.export.decoder import ExportError, Precision, export_graphs
from guard_quantization.export.graph import DATA_FILE
from guard_quantization.export.hf import LLAMA_GUARD_3_1B, export_checkpoint
from guard_service.artifact import load
from guard_service.conversation import Conversation
from guard_service.engines.onnx import OnnxEngine
from tests.quantization.export.test_decoder import Runner
from tests.quantization.verdict_tokenizer import verdict_ranks, verdict_tokenizer

FLOAT = Precision(bits=32, embedding_bits=32)
CONVERSATION = Conversation.of(("user", "Is the kettle on?"), ("assistant", "It sings."))


def build(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=verdict_tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    # Shards, as the larger checkpoints have; bfloat16, as the published ones are.
    build(request.param).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.model").write_bytes(verdict_ranks())
    return folder


def reference(source: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def test_float_graph_equals_transformers_with_and_without_a_snapshot(
    source: Path, tmp_path: Path
) -> None:
    head = verdict_tokens(verdict_tokenizer(), LLAMA_GUARD_3_1B.codes).head
    rng = np.random.default_rng(1)
    prefix, rows = rng.integers(0, 600, 300), rng.integers(0, 600, (3, 40))
    read = np.array([[0, 39], [20, 21], [38, 5]])
    whole = np.concatenate([np.tile(prefix, (3, 1)), rows], axis=1)
    with torch.no_grad():
        logits = reference(source)(torch.from_numpy(whole)).logits.numpy()
    wanted = np.stack([logits[at, 300 + read[at]][:, head] for at in range(3)])
    config = json.loads((source / "config.json").read_text())
    runner = Runner(tmp_path, config, Tensors(source), FLOAT, head)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(runner.logits(whole, read + 300), wanted, atol=1e-3, rtol=1e-4)
    past = runner.snapshot(prefix)
    np.testing.assert_allclose(runner.logits(rows, read, past), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "most"), [(FLOAT, 1e-4), (Precision(), 0.25)], ids=["fp32", "int4"]
)
def test_an_exported_folder_scores_as_transformers_does(
    source: Path, tmp_path: Path, precision: Precision, most: float
) -> None:
    artifact = export_checkpoint(source, tmp_path / "guard", precision=precision)
    engine = OnnxEngine(load(tmp_path / "guard"))
    engine.self_test()
    (prompt,) = engine.prompt_builder().build(CONVERSATION, LLAMA_GUARD_3[:13]).prompts
    (found,) = engine.assess([prompt])
    verdict = artifact.manifest.verdict
    ids = [*prompt.prefix, *prompt.body, *prompt.closing]
    ids += [verdict.unsafe, verdict.newline, verdict.mark]
    with torch.no_grad():
        logits = reference(source)(torch.tensor([ids])).logits[0]
    unsafe = torch.softmax(logits[-4, [verdict.safe, verdict.unsafe]], 0)[1].item()
    codes = torch.softmax(logits[-1, [verdict.codes[code] for code in prompt.categories]], 0)
    assert found.assessment.unsafe_score == pytest.approx(unsafe, abs=most)
    scores = list(found.assessment.category_scores.values())
    assert scores == pytest.approx((codes * unsafe).tolist(), abs=most)


@pytest.mark.parametrize("precision", [FLOAT, Precision(), Precision(8, embedding_bits=8)])
def test_the_room_that_is_asked_for_is_what_the_graph_takes(
    source: Path, tmp_path: Path, precision: Precision
) -> None:
    manifest = export_checkpoint(source, tmp_path / "guard", precision=precision).manifest
    config, rows = json.loads((source / "config.json").read_text()), len(manifest.verdict.head)
    p = precision
    asked = stored_bytes(config, rows, p.bits, p.block, p.embedding_bits)
    # Small tensors lie in the graph, not in this file.
    assert manifest.files[DATA_FILE].size == pytest.approx(asked, rel=0.1)


def test_pickled_weights_are_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / "tokenizer.model", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ExportError, match="pickles"):
        export_checkpoint(folder, tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_an_index_may_not_lead_out_of_its_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "led"
    shutil.copytree(source, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}}))
    with pytest.raises(ExportError, match="weight_map"):
        Tensors(folder)


def test_damaged_and_missing_tensors_are_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        export_graphs(tmp_path, config, Tensors(folder), (1,), FLOAT)
    with pytest.raises(ExportError, match="no tensor x"):
        Tensors(folder)["x"]
