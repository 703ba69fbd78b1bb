"""The whole way from data to a served artifact, in small; and what a run folder protects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

from guard_quantization.data import probe_rows
from guard_quantization.recipe import load_starter_recipe
from guard_quantization.starter.pipeline import Pipeline, StaleStage
from guard_quantization.starter.release import release
from guard_service.engines import open_engine
from tests.quantization.small_wordnet import write_wordnet

BAD, GOOD = ("burn", "steal", "hurt", "poison"), ("bake", "paint", "plant", "sew")
THINGS = ("house", "garden", "boat", "cake", "fence")
RECIPE = {
    "name": "small",
    "seed": 0,
    "held_out": ["elsewhere"],
    "tokenizer": {"size": 600},
    "teacher": {
        "lr": 1e-3,
        "most_tokens": 32,
        "languages": ["en"],
        "epochs": [{"toy": [80, 1.0]}],
    },
    "student": {
        "template": "compact-fixed",
        "window_tokens": 128,
        "shape": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
        },
        "dropout": 0.0,
        "lr": 4e-3,
        "embedding_lr": 1e-2,
        "tokens": 512,
        "quantized_from": 0.8,
        "trust": 0.4,
        "exchanged": 30,
        "languages": [],
        "epochs": [{"toy": [110, 1.0], "exchanged": [12, 1.0]}] * 16,
    },
    "export": {"bits": 4, "block": 32, "embedding_bits": 8, "accuracy_level": 4},
}


def toy_row(number: int) -> dict[str, object]:
    unsafe = number % 2 == 0
    words = BAD if unsafe else GOOD
    text = f"please {words[number // 2 % 4]} my {THINGS[number // 8 % 5]}"
    reply = number % 4 >= 2
    turns = [{"role": "user", "content": "go on" if reply else text}]
    turns += [{"role": "assistant", "content": text}] if reply else []
    return {
        "id": f"toy-{number}",
        "messages": turns,
        "target_role": turns[-1]["role"],
        "label": "unsafe" if unsafe else "safe",
        "categories": ["S2"] if unsafe else [],
        "language": "en",
        "source": "toy" if number % 7 else "elsewhere",
        "split": "dev" if number % 5 == 0 else "train",
    }


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BAD, *GOOD, *THINGS]
    words += ["please", "my", "go", "on", "user", "agent", *map(chr, range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Pipeline:
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "data").mkdir()
    lines = "\n".join(json.dumps(toy_row(number)) for number in range(160))
    (folder / "data" / "toy.jsonl").write_text(lines + "\n")
    recipe = load_starter_recipe(folder / "small.yaml")
    wordnet = write_wordnet(folder / "wordnet")
    made = Pipeline(recipe, folder / "data", folder / "runs", encoder, wordnet)
    made.rows = [row for row in made.rows if row.file == "toy"]  # not the package's families
    return made


def test_data_become_an_artifact_that_serves_and_knows_its_figures(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [row for row in probe_rows() if row.language == "en"][::20]
    monkeypatch.setattr("guard_quantization.starter.release.probe_rows", lambda: few)
    artifact = release(pipeline, tmp_path / "made")
    engine = open_engine(tmp_path / "made")
    engine.self_test()
    assert engine.card.template == "compact-fixed"
    found = json.loads((pipeline.folder / "evaluation.json").read_text())
    assert found["dev"]["auroc"] > 0.9  # the toy words tell the rows apart
    assert {"teacher", "student"} <= found["transfer"]["probe_en"].keys()
    card = (tmp_path / "made" / "MODEL_CARD.md").read_text()
    assert "not Llama Guard 3" in card and f"{found['dev']['auroc']:.3f}" in card
    with pytest.raises(FileExistsError, match="never written over"):
        release(pipeline, tmp_path / "made")
    assert artifact.manifest.digest == engine.card.digest


def test_a_finished_stage_is_not_done_again(pipeline: Pipeline) -> None:
    pipeline.tokenizer()
    before = (pipeline.folder / "tokenizer.json").stat().st_mtime_ns
    pipeline.tokenizer()
    assert (pipeline.folder / "tokenizer.json").stat().st_mtime_ns == before


def test_a_result_of_other_data_is_never_taken_for_this_one_s(pipeline: Pipeline) -> None:
    pipeline.tokenizer()
    other = Pipeline(
        pipeline.recipe, pipeline.data, pipeline.folder.parent, encoder=pipeline.encoder
    )
    other.rows = pipeline.rows[1:]
    with pytest.raises(StaleStage, match="other data"):
        other.tokenizer()


def test_held_out_sources_are_never_trained_on(pipeline: Pipeline) -> None:
    assert any(row.source == "elsewhere" for row in pipeline.rows)
    assert all(row.source != "elsewhere" for row in pipeline.train_rows)
