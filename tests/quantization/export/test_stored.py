"""An artifact's weights, read back as they were stored, and put into new graphs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from guard_quantization.__main__ import app
from guard_quantization.export.artifact import make_artifact
from guard_quantization.export.decoder import ExportError, Precision
from guard_quantization.export.int4 import Blocks, quantize_blocks
from guard_quantization.export.renew import renewed
from guard_quantization.export.stored import StoredModel
from guard_service.artifact import MODEL_FILE, Artifact, load, seal
from tests.quantization.verdict_tokenizer import verdict_tokenizer
from tests.service.tiny_artifact import CONFIG, RELEASE, tiny_artifact, tiny_weights

INT4 = Precision(bits=4, block=16, embedding_bits=4)
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("precision", [INT4, Precision(8, 32, 8), Precision(32, 32, 32)], ids=str)
def test_weights_are_those_that_were_stored(tmp_path: Path, precision: Precision) -> None:
    weights = tiny_weights()
    stored = StoredModel(tiny_artifact(tmp_path / "made", weights=weights, precision=precision))
    for name, weight in weights.items():
        found = stored[name]
        bits, block = precision.bits, precision.block
        if name.startswith("model.embed"):
            bits = precision.embedding_bits
            block = block if bits == 4 else weight.shape[1]
        if bits == 32 or weight.ndim == 1 or name.startswith("lm_head"):
            assert isinstance(found, np.ndarray) and np.array_equal(found, weight)
        else:
            wanted = quantize_blocks(weight, bits, block)
            assert isinstance(found, Blocks)
            assert np.array_equal(found.codes, wanted.codes)
            assert np.array_equal(found.scales, wanted.scales)


@pytest.mark.parametrize("scaling", [None, LLAMA_3], ids=["plain", "llama3"])
def test_the_config_is_the_models(tmp_path: Path, scaling: object) -> None:
    config = {**CONFIG, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": scaling}
    made = make_artifact(
        tmp_path / "made",
        config,
        tiny_weights(),
        verdict_tokenizer(),
        RELEASE,
        INT4,
        head_is_cut=True,
    )
    found = StoredModel(made).config
    assert {name: found[name] for name in config} == config


def test_a_renewed_artifact_scores_as_before(tmp_path: Path) -> None:
    old = earlier(tiny_artifact(tmp_path / "made", precision=INT4))
    new = renewed(old, tmp_path / "renewed")
    for before, after in zip(old.manifest.golden, new.manifest.golden, strict=True):
        assert before.turns == after.turns and before.unsafe == pytest.approx(after.unsafe)
    assert new.manifest.provenance["renewed"] == old.digest
    assert {"model.int8.onnx", "model.fp32.onnx"} <= set(new.manifest.files)


def test_renew_writes_nothing_over(tmp_path: Path) -> None:
    made = tiny_artifact(tmp_path / "made")
    again = CliRunner().invoke(app, ["renew", str(made.folder), str(made.folder)])
    assert isinstance(again.exception, FileExistsError)
    assert load(made.folder).digest == made.digest


def test_a_graph_of_others_is_refused(tmp_path: Path) -> None:
    made = tiny_artifact(tmp_path / "made")
    model = onnx.load(made.model, load_external_data=False)
    del model.graph.initializer[:]
    onnx.save(model, made.model)
    with pytest.raises(ExportError, match="not a graph that guard-quantize wrote"):
        StoredModel(seal(made.folder, made.manifest))


def earlier(artifact: Artifact) -> Artifact:
    """The artifact as the first version wrote it: one graph, other names, the factor of attention
    in the weights of the queries."""
    model = onnx.load(artifact.model)
    shape = artifact.manifest.geometry
    for node in model.graph.node:
        node.input[:] = [_old(name) for name in node.input]
        if node.op_type == "FusedMatMul":
            kept = [one for one in node.attribute if one.name != "alpha"]
            del node.attribute[:]
            node.attribute.extend(kept)
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".qkv.scales", ".q.scales")):
            scales = numpy_helper.to_array(tensor).copy()
            scales[: shape.heads * shape.head_dim] /= math.sqrt(shape.head_dim)
            tensor.raw_data = scales.tobytes()
        tensor.name = _old(tensor.name)
    for path in artifact.folder.glob("model*"):
        path.unlink()
    onnx.save(
        model, artifact.folder / MODEL_FILE, save_as_external_data=True, location="model.onnx.data"
    )
    return seal(artifact.folder, artifact.manifest)


def _old(name: str) -> str:
    for stack, part in (("qkv", "self_attn"), ("kv", "self_attn"), ("q", "self_attn")):
        name = name.replace(f".{stack}.", f".{part}.{stack}.")
    for stack in ("gate_up", "down"):
        name = name.replace(f".{stack}.", f".mlp.{stack}.")
    return name
