"""Checkpoint folders are hostile: mistakes are named, nothing is run, nothing outside is read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard_service.artifact import ArtifactError
from guard_service.engines import EngineFailed, open_engine
from guard_service.engines.torch.folder import read_folder
from guard_service.manifest import File
from guard_service.pulled import Pulled, sha256_of
from tests.service.torch.conftest import opened
from tests.service.torch.prompts import picture, prompt

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(params=["text", "vision"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return copied(request.getfixturevalue(f"{request.param}_folder"), tmp_path)


def copied(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def rewritten(path: Path, change: Change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_engine(folder)
    return str(caught.value)


CONFIGS: dict[str, tuple[Change, str]] = {
    "code": (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "quantized": (lambda c: c.update(quantization_config={"bits": 4}), "quantization_config"),
    "no architecture": (lambda c: c.pop("architectures"), "architectures is None"),
    "another": (lambda c: c.update(architectures=["EvilForCausalLM"]), "architectures"),
    "two": (lambda c: c.update(architectures=["LlamaForCausalLM"] * 2), "architectures"),
    "template": (lambda c: c.update(guard_template="compact2"), "guard_template"),
}
TEXTS: dict[str, tuple[Change, str]] = {
    "layers": (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
    "layers, huge": (lambda c: c.update(num_hidden_layers=10**400), "num_hidden_layers"),
    "width": (lambda c: c.update(hidden_size=-32), "hidden_size"),
    "width, a text": (lambda c: c.update(hidden_size="32"), "hidden_size"),
    "heads": (lambda c: c.update(num_attention_heads=5), "num_attention_heads"),
    "heads, a truth": (lambda c: c.update(num_key_value_heads=True), "num_key_value_heads"),
    "words": (lambda c: c.pop("vocab_size"), "vocab_size is None"),
    "norm": (lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "rope": (lambda c: c.update(rope_parameters=None, rope_scaling={"rope_type": "yarn"}), "rope"),
    "activation": (lambda c: c.update(hidden_act="relu"), "hidden_act"),
    "tied": (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings"),
}
VISIONS: dict[str, tuple[Change, str]] = {
    "no vision": (lambda c: c.pop("vision_config"), "vision_config is None"),
    "channels": (lambda c: c["vision_config"].update(num_channels=1), "num_channels"),
    "tiles": (lambda c: c["vision_config"].update(max_num_tiles=10**6), "max_num_tiles"),
    "ratios": (
        lambda c: c["vision_config"].update(supported_aspect_ratios=[[1, 1]]),
        "supported_aspect_ratios",
    ),
    "patches": (lambda c: c["vision_config"].update(patch_size=9), "vision sizes"),
    "kept": (
        lambda c: c["vision_config"].update(intermediate_layers_indices=[0, 7]),
        "intermediate_layers_indices",
    ),
    "width": (lambda c: c["vision_config"].update(vision_output_dim=64), "vision_output_dim"),
    "first": (
        lambda c: c["text_config"].update(cross_attention_layers=[0, 3]),
        "cross_attention_layers",
    ),
    "token": (lambda c: c.update(image_token_index=10**6), "image_token_index"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_not_a_guards_is_refused_by_its_field(folder: Path, case: str) -> None:
    change, said = CONFIGS[case]
    rewritten(folder / "config.json", change)
    assert said in refusal(folder)


@pytest.mark.parametrize("case", TEXTS)
def test_sizes_out_of_bounds_are_refused_before_anything_is_made(folder: Path, case: str) -> None:
    change, said = TEXTS[case]
    rewritten(folder / "config.json", lambda c: change(c.get("text_config", c)))
    assert said in refusal(folder)


@pytest.mark.parametrize("case", VISIONS)
def test_vision_that_does_not_fit_is_refused(
    vision_folder: Path, tmp_path: Path, case: str
) -> None:
    folder = copied(vision_folder, tmp_path)
    change, said = VISIONS[case]
    rewritten(folder / "config.json", change)
    assert said in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b" " * (2**20 + 1)])
def test_config_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


def test_fields_that_name_code_weights_or_adapters_are_never_followed(folder: Path) -> None:
    rewritten(
        folder / "config.json",
        lambda c: c.update(
            _name_or_path="/etc", transformers_weights="/etc/passwd", attn_implementation="evil/x"
        ),
    )
    evil = folder / "modeling_evil.py"
    evil.write_text("raise SystemExit")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/evil"}')
    (folder / "generation_config.json").write_text("not JSON")
    opened(folder).self_test()


def tensors(folder: Path) -> dict[str, Any]:
    """All of them, moved into one file."""
    found: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return found


def ending(tensors: dict[str, Any], name: str) -> str:
    return next(key for key in tensors if key.endswith(name))


def spoil(change: str, tensors: dict[str, Any]) -> str:
    """Change a tensor; returns what is to be said of it."""
    name = ending(tensors, "layers.0.mlp.up_proj.weight")
    value = tensors[name]
    match change:
        case "missing":
            del tensors[name]
            return "1 tensors are missing"
        case "another":
            tensors["evil.weight"] = value.clone()
            return "'evil.weight' is not one"
        case "shape":
            tensors[name] = value[:, 1:].contiguous()
            return "must be [48, 32]"
        case "codes":
            tensors[name] = value.to(torch.int8)
            return "is I8"
        case _:
            value[3, 3] = float(change)
            return "no finite number"


@pytest.mark.parametrize("change", ["missing", "another", "shape", "codes", "nan", "inf", "-inf"])
def test_tensors_are_the_geometrys_and_finite(folder: Path, change: str) -> None:
    found = tensors(folder)
    said = spoil(change, found)
    save_file(found, folder / "model.safetensors")
    assert said in refusal(folder)


def test_tensor_by_both_of_its_names_is_refused(vision_folder: Path, tmp_path: Path) -> None:
    folder = copied(vision_folder, tmp_path)
    found = tensors(folder)
    found["lm_head.weight"] = found["language_model.lm_head.weight"].clone()
    save_file(found, folder / "model.safetensors")
    assert "there twice" in refusal(folder)


def test_pickles_are_refused_by_name(folder: Path) -> None:
    tensors(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "pickles" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7])
def test_index_names_files_of_the_folder_only(text_folder: Path, tmp_path: Path, name: Any) -> None:
    folder = copied(text_folder, tmp_path)
    index = folder / "model.safetensors.index.json"
    rewritten(index, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    assert "files of this folder" in refusal(folder)


def test_links_out_of_the_folder_and_damaged_files_are_refused(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert "a link out of the folder" in refusal(folder)
    shard.unlink()
    shard.write_bytes(outside.read_bytes()[:-100])
    assert "get it anew" in refusal(folder)
    shard.unlink()
    assert "is missing" in refusal(folder)


def test_tokenizer_is_needed_and_is_the_models(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: is missing" in refusal(folder)
    document = json.loads(whole)
    document["added_tokens"] += [
        {**document["added_tokens"][-1], "id": 5000 + at, "content": f"<|more_{at}|>"}
        for at in range(3)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert "more tokens than the model" in refusal(folder)


def test_preprocessor_that_wants_other_pixels_is_refused(
    vision_folder: Path, tmp_path: Path
) -> None:
    folder = copied(vision_folder, tmp_path)
    path = folder / "preprocessor_config.json"
    stated = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 0.00392156862745098,
        "resample": 2,
        "size": {"height": 28, "width": 28},
        "max_image_tiles": 4,
        "do_pad": True,
        "image_processor_type": "MllamaImageProcessor",
    }
    path.write_text(json.dumps(stated))
    digest = read_folder(folder).digest
    assert digest != read_folder(vision_folder).digest
    for name, value in (("image_mean", [0.5] * 3), ("max_image_tiles", 1), ("do_pad", False)):
        path.write_text(json.dumps({**stated, name: value}))
        assert name in refusal(folder)


def test_folder_that_was_pulled_is_as_it_was_pulled(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    files = {name: File((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}
    Pulled("owner/name", "0" * 40, "https://hub.example", "2026-01-01", files).write(folder)
    opened(folder)
    rewritten(folder / "config.json", lambda c: c.update(random_weights=True))
    assert "not as it was pulled: config.json" in refusal(folder)


def test_card_tells_what_the_folder_is(vision_folder: Path, tmp_path: Path) -> None:
    folder = copied(vision_folder, tmp_path)
    card = opened(folder).card
    assert (card.name, card.template) == ("copy", "llama-guard-3-11b-vision")
    assert card.judges_images and card.custom_categories and len(card.categories) == 13
    assert card.notice == "Built with Llama" and card.plan == "float32"
    assert card.parameters == sum(one.numel() for one in tensors(folder).values())


def test_random_weights_and_own_templates_are_said(text_folder: Path, tmp_path: Path) -> None:
    folder = copied(text_folder, tmp_path)
    before = opened(folder).card
    assert before.template == "llama-guard-3-1b" and not before.judges_images
    rewritten(folder / "config.json", lambda c: c.update(random_weights=True))
    assert "random weights" in opened(folder).card.notice
    rewritten(
        folder / "config.json",
        lambda c: c.update(random_weights=False, guard_template="compact"),
    )
    card = opened(folder).card
    assert (card.template, card.notice) == ("compact", "")
    assert len({before.digest, card.digest}) == 2


def test_text_model_cannot_judge_images(text_folder: Path, vision_folder: Path) -> None:
    shown = prompt(opened(vision_folder), "hi", shown=picture(1))
    with pytest.raises(EngineFailed, match="cannot judge images"):
        opened(text_folder).assess([shown])


def test_cuda_that_is_not_there_is_said(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineFailed, match="--device cpu"):
        open_engine(text_folder, device="cuda")
