"""Random checkpoints have the layout of real ones and say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, LlamaForCausalLM
from typer.testing import CliRunner

from guard_quantization.__main__ import app
from guard_quantization.checkpoint.random_weights import write_random_checkpoint
from guard_quantization.checkpoint.tensors import Tensors, parameters
from guard_quantization.export.decoder import ExportError
from guard_quantization.export.hf import read_source
from guard_service.engines import open_engine
from guard_service.engines.torch.published import LLAMA_GUARD_3_1B, LLAMA_GUARD_3_11B_VISION
from tests.quantization.tiny_llama import SIZES
from tests.quantization.verdict_tokenizer import verdict_ranks, verdict_tokenizer

REFERENCE = Path(__file__).parents[4] / "shared/reference/model_configs.json"
CONFIG: dict[str, Any] = {
    **LLAMA_GUARD_3_1B,
    **SIZES,
    "vocab_size": verdict_tokenizer().get_vocab_size(),
}


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(verdict_ranks())
    return path


def test_it_loads_in_transformers_and_is_marked(tmp_path: Path, ranks: Path) -> None:
    count = write_random_checkpoint(tmp_path / "random", CONFIG, ranks, 1, shard_bytes=100_000)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "random", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.num_parameters() == count == parameters(CONFIG)
    assert AutoConfig.from_pretrained(tmp_path / "random").random_weights is True
    assert model.generation_config.eos_token_id == [128001, 128008, 128009]
    assert read_source(tmp_path / "random").tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    shards = list((tmp_path / "random").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 110_000 for path in shards)
    index = json.loads((tmp_path / "random/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * count
    assert {path.name for path in shards} == set(index["weight_map"].values())


def test_one_file_has_no_index(tmp_path: Path, ranks: Path) -> None:
    write_random_checkpoint(tmp_path / "random", CONFIG, ranks, 1, dtype="float32")
    assert not (tmp_path / "random/model.safetensors.index.json").exists()
    with safe_open(tmp_path / "random/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.float32


def test_weights_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path, ranks: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def made(folder: str, seed: int, shard_bytes: int) -> Any:
        write_random_checkpoint(tmp_path / folder, CONFIG, ranks, seed, shard_bytes=shard_bytes)
        return Tensors(tmp_path / folder)[name]

    one, same, other = made("a", 1, 50_000), made("b", 1, 2**30), made("c", 2, 2**30)
    assert (one == same).all() and (one != other).any()
    assert one.std() == pytest.approx(0.02, rel=0.05)


def test_norms_are_near_one_with_outliers_on_request(tmp_path: Path, ranks: Path) -> None:
    write_random_checkpoint(tmp_path / "plain", CONFIG, ranks, 1)
    write_random_checkpoint(tmp_path / "spiked", CONFIG, ranks, 1, outliers=3)
    name = "model.layers.{}.input_layernorm.weight"
    assert abs(Tensors(tmp_path / "plain")[name.format(0)] - 1).max() < 0.4
    first, last = (Tensors(tmp_path / "spiked")[name.format(at)] > 5 for at in (0, 3))
    assert first.sum() == 3 and (first == last).all()


def test_a_tokenizer_json_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    verdict_tokenizer().save(str(path))
    write_random_checkpoint(tmp_path / "random", CONFIG, path, 1)
    assert (tmp_path / "random/tokenizer.json").read_bytes() == path.read_bytes()
    assert Tokenizer.from_file(str(tmp_path / "random/tokenizer.json"))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (CONFIG | {"vocab_size": 100}, {}, "vocab_size"),
        (CONFIG | {"hidden_act": "gelu"}, {}, "hidden_act"),
        (CONFIG, {"dtype": "int8"}, "dtype"),
        (CONFIG, {"outliers": 65}, "outliers"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, ranks: Path, config: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        write_random_checkpoint(tmp_path / "random", config, ranks, 1, **options)
    assert not (tmp_path / "random").exists()


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path: Path, ranks: Path) -> None:
    vast = CONFIG | {"hidden_size": 2**19, "intermediate_size": 2**19, "num_hidden_layers": 2**9}
    with pytest.raises(OSError, match="make room"):
        write_random_checkpoint(tmp_path / "random", vast, ranks, 1)
    assert list(tmp_path.iterdir()) == [ranks]


def test_nothing_is_written_over(tmp_path: Path, ranks: Path) -> None:
    (tmp_path / "random").mkdir()
    with pytest.raises(FileExistsError):
        write_random_checkpoint(tmp_path / "random", CONFIG, ranks, 1)


def test_the_1b_geometry_has_the_published_sizes() -> None:
    smaller = {**LLAMA_GUARD_3_1B, "num_hidden_layers": 12, "intermediate_size": 6400}
    assert parameters(LLAMA_GUARD_3_1B) == 1_498_482_688
    assert parameters(smaller) == 1_123_076_096
    assert parameters({**smaller, "verdict_head": list(range(20))}) == 860_448_768


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference values are not at hand")
def test_the_1b_geometry_is_the_reference() -> None:
    reference = json.loads(REFERENCE.read_text())["Llama-Guard-3-1B"]
    assert reference["config"] == LLAMA_GUARD_3_1B
    assert reference["parameters"] == parameters(LLAMA_GUARD_3_1B)


def test_a_random_mllama_loads_judges_and_is_marked(tmp_path: Path, ranks: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = {
        **LLAMA_GUARD_3_11B_VISION,
        "image_token_index": verdict_tokenizer().get_vocab_size(),
        "text_config": {
            **LLAMA_GUARD_3_11B_VISION["text_config"],
            **{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2},
            "cross_attention_layers": [1, 3],
            "vocab_size": verdict_tokenizer().get_vocab_size(),
        },
        "vision_config": {
            **LLAMA_GUARD_3_11B_VISION["vision_config"],
            **{**sizes, "attention_heads": 4, "num_global_layers": 2, "image_size": 28},
            "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96,
        },
    }
    folder = tmp_path / "random"
    count = write_random_checkpoint(folder, config, ranks, 1, shard_bytes=100_000)
    engine = open_engine(folder)
    engine.self_test()
    assert engine.card.judges_images and engine.card.parameters == count
    assert "random weights" in engine.card.notice
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config))
    asked = ["random", str(tmp_path / "cli"), "--tokenizer", str(ranks), "--config", str(again)]
    assert CliRunner().invoke(app, [*asked, "--seed", "1"]).exit_code == 0
    wanted = sorted(one.name for one in (tmp_path / "cli").glob("*.safetensors"))
    assert wanted == ["model.safetensors"]
    wrong = {**config, "vision_config": {**config["vision_config"], "patch_size": 9}}
    with pytest.raises(ExportError, match="vision sizes"):
        write_random_checkpoint(tmp_path / "wrong", wrong, ranks, 1)
