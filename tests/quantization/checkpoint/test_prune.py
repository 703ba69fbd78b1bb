"""Pruning removes what does nothing, and what it writes is what it measured."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from guard_quantization.checkpoint.comparison import agreement
from guard_quantization.checkpoint.prune import PruneError, PrunePlan, prune
from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.checkpoint.tensors import HEAD
from guard_quantization.export.artifact import verdict_tokens
from guard_quantization.export.decoder import ExportError
from guard_quantization.training import Report
from tests.quantization.tiny_llama import SIZES, random_rows, saved, tiny_llama
from tests.quantization.verdict_tokenizer import verdict_tokenizer

VERDICT = verdict_tokens(verdict_tokenizer(), [f"S{number}" for number in range(1, 14)]).head
VOCABULARY = verdict_tokenizer().get_vocab_size()
ROWS = random_rows(12, VOCABULARY)
PLAN = PrunePlan(rows=8, held_back=4, head=False, keep_first=0, keep_last=0)
Unlike = Callable[[LlamaForCausalLM], None]


def replaced(**plan: Any) -> PrunePlan:
    return dataclasses.replace(PLAN, **plan)


def pruned(model: LlamaForCausalLM, place: Path, **plan: Any) -> tuple[Path, dict[str, Any]]:
    saved(model, place / "source")
    figures = prune(place / "source", place / "small", replaced(**plan), ROWS, VERDICT)
    return place / "small", figures


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def make_identity(model: LlamaForCausalLM) -> None:
    model.model.layers[2].self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()


def kill_neurons(model: LlamaForCausalLM) -> None:
    for at, layer in enumerate(model.model.layers):
        layer.mlp.gate_proj.weight[torch.arange(at % 3, 96, 3)] = 0


def kill_groups(model: LlamaForCausalLM) -> None:
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.weight[at % 3 * 16 : at % 3 * 16 + 16] = 0


def kill_channels(model: LlamaForCausalLM) -> None:
    dead = torch.arange(0, 64, 2)
    model.model.embed_tokens.weight[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.down_proj.weight[dead] = 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("kill", "plan", "changed"),
    [
        (make_identity, {"layers": 3}, {"num_hidden_layers": 3}),
        (kill_neurons, {"intermediate_size": 64}, {"intermediate_size": 64}),
        (kill_groups, {"kv_groups": 2}, {"num_key_value_heads": 2, "num_attention_heads": 4}),
        (kill_channels, {"hidden_size": 32}, {"hidden_size": 32}),
    ],
    ids=["layer", "neurons", "groups", "channels"],
)
def test_what_does_nothing_is_removed_and_no_output_changes(
    tmp_path: Path, tied: bool, kill: Unlike, plan: dict[str, int], changed: dict[str, int]
) -> None:
    model = tiny_llama(tie_word_embeddings=tied, rms_norm_eps=1e-7)
    kill(model)
    folder, figures = pruned(model, tmp_path, **plan)
    small = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = {name: getattr(model.config, name) for name in SIZES} | changed
    assert {name: getattr(small.config, name) for name in SIZES} == wanted
    assert small.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-3, atol=1e-3)
    last = figures["steps"][-1]
    assert last["p_unsafe_difference"] < 1e-4 and last["verdict_agreement"] == 1
    assert last["parameters"] == small.num_parameters()


def test_the_layer_that_is_an_identity_goes(tmp_path: Path) -> None:
    model = tiny_llama()
    make_identity(model)
    _, figures = pruned(model, tmp_path, layers=3)
    assert figures["kept_layers"] == [0, 1, 3]
    assert len(figures["blocks"]) == 4 and abs(figures["blocks"][2]) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_the_room_that_is_asked_for_is_what_the_weights_take(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {**ALL, "head": True}
    _, figures = pruned(tiny_llama(tie_word_embeddings=tied), tmp_path, **plan)
    size = round(figures["steps"][-1]["mib"] * 2**20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    prune(tmp_path / "source", tmp_path / "again", replaced(**plan), ROWS, VERDICT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(OSError, match="make room"):
        prune(tmp_path / "source", tmp_path / "third", replaced(**plan), ROWS, VERDICT)


def test_protected_layers_stay_whatever_they_do(tmp_path: Path) -> None:
    model = tiny_llama()
    make_identity(model)
    _, figures = pruned(model, tmp_path, layers=3, keep_last=2)
    assert 2 in figures["kept_layers"] and 3 in figures["kept_layers"]


ALL = {"layers": 3, "intermediate_size": 50, "kv_groups": 2, "hidden_size": 40, "head": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_step_at_once_gives_a_model_as_it_was_measured(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_llama().to(dtype)
    folder, figures = pruned(model, tmp_path, **ALL)
    config = config_of(folder)
    assert (config["intermediate_size"], config["hidden_size"]) == (64, 64)  # up to 32s
    assert config["verdict_head"] == list(VERDICT)
    small = load_llama(folder)
    source = model.float()
    reference = torch.stack([source(torch.tensor([row])).logits[0, [-4, -1]] for row in ROWS[8:]])
    found = torch.stack([small(torch.tensor([row])).logits[0, [-4, -1]] for row in ROWS[8:]])
    told = figures["steps"][-1]
    wanted = agreement(reference[..., list(VERDICT)], found.detach())
    assert {name: told[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert told["kl"] > 1e-3  # something was lost, or this shows nothing
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    assert {tensor.dtype for shard in shards for tensor in shard.values()} == {dtype}
    assert told["mib"] * 2**20 == sum(t.nbytes for shard in shards for t in shard.values())


def test_each_step_is_reported_in_order(tmp_path: Path) -> None:
    _, figures = pruned(tiny_llama(), tmp_path, **{**ALL, "hidden_size": 32})
    steps = figures["steps"]
    assert [s["step"] for s in steps] == ["source", "depth", "mlp", "groups", "hidden", "head"]
    assert steps[0]["kl"] == 0 and steps[0]["verdict_agreement"] == 1
    sizes = [step["mib"] for step in steps]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 6
    assert len(figures["neurons"]["percentiles"]) == 3  # measured after the layer had gone
    assert all(0.5 < share < 1 for share in figures["neurons"]["kept_share"])
    json.dumps(figures, allow_nan=False)


def test_a_cut_head_has_the_rows_of_the_verdict_tokens(tmp_path: Path) -> None:
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        folder, _ = pruned(model, tmp_path / str(tied), head=True)
        assert config_of(folder)["tie_word_embeddings"] is False
        small = load_llama(folder)
        torch.testing.assert_close(logits(small), logits(model)[:, list(VERDICT)])


def test_a_source_whose_head_is_cut_is_pruned_further(tmp_path: Path) -> None:
    first, _ = pruned(tiny_llama(), tmp_path, head=True)
    figures = prune(first, tmp_path / "second", replaced(layers=3, head=True), ROWS, None)
    assert [step["step"] for step in figures["steps"]] == ["source", "depth"]
    assert config_of(tmp_path / "second")["verdict_head"] == list(VERDICT)
    load_llama(tmp_path / "second")
    with pytest.raises(PruneError, match="verdict_head"):
        prune(first, tmp_path / "third", PLAN, ROWS, VERDICT[::-1])


def test_the_tokenizer_comes_along_and_code_does_not(tmp_path: Path) -> None:
    source = saved(tiny_llama(), tmp_path / "source")
    config = config_of(source) | {"auto_map": {"AutoModel": "evil.Model"}, "random_weights": True}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text("raise SystemExit")
    prune(source, tmp_path / "small", PLAN, ROWS, VERDICT)
    assert (tmp_path / "small/tokenizer.model").is_file()
    assert not (tmp_path / "small/evil.py").exists()
    found = config_of(tmp_path / "small")
    assert "auto_map" not in found and found["random_weights"] is True


def test_pruning_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pruned(tiny_llama(), tmp_path / name, **ALL)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "small").iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_long_rows_keep_their_first_token_and_their_end(tmp_path: Path) -> None:
    source = saved(tiny_llama(), tmp_path / "source")
    plan = replaced(layers=3, tokens=9)
    cut = [row if len(row) <= 9 else [row[0], *row[-8:]] for row in ROWS]
    long, short = (
        prune(source, tmp_path / name, plan, rows, VERDICT)
        for name, rows in (("long", ROWS), ("short", cut))
    )
    assert long == short


class Stopped(Exception):
    """What a test raises in place of Ctrl-C."""


class Stopping(Report):
    """Progress that stops the run when a certain piece of work begins."""

    at_work: str = ""
    seen: list[str]

    def __init__(self, what: str, steps: int) -> None:
        self.seen.append(what)
        if what == self.at_work:
            raise Stopped
        super().__init__(what, steps)


@pytest.mark.parametrize("work", ["measuring for depth", "comparing groups", "writing"])
def test_an_interrupted_run_goes_on_behind_its_last_step(tmp_path: Path, work: str) -> None:
    folder, whole = pruned(tiny_llama(), tmp_path, **{**ALL, "hidden_size": 32})
    plan = replaced(**{**ALL, "hidden_size": 32})
    seen: list[str] = []
    first = type("First", (Stopping,), {"at_work": work, "seen": seen})
    second = type("Second", (Stopping,), {"seen": seen})
    run = partial(prune, tmp_path / "source", tmp_path / "again", plan, ROWS, VERDICT)
    with pytest.raises(Stopped):
        run(report=first, progress=tmp_path / "steps.json")
    assert not (tmp_path / "again").exists()
    finished = seen[1 : -2 if work.startswith("comparing") else -1]
    at = len(seen)
    assert run(report=second, progress=tmp_path / "steps.json") == whole
    assert finished and not set(seen[at:]) & set(finished)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_progress_of_another_plan_is_not_taken(tmp_path: Path) -> None:
    source = saved(tiny_llama(), tmp_path / "source")
    progress = tmp_path / "steps.json"
    prune(source, tmp_path / "wide", replaced(layers=3), ROWS, VERDICT, progress=progress)
    narrow = replaced(layers=2)
    figures = prune(source, tmp_path / "narrow", narrow, ROWS, VERDICT, progress=progress)
    assert figures == prune(source, tmp_path / "alone", narrow, ROWS, VERDICT)


def test_agreement_is_what_its_words_say() -> None:
    reference = torch.tensor([[[0.0, 0.0, 0.0]], [[2.0, 0.0, -9.0]]]).log_softmax(-1)
    found = torch.tensor([[[0.0, 1.0, 0.0]], [[0.0, 1.0, -9.0]]])
    told = agreement(reference, found)
    sigmoid = torch.sigmoid(torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64))
    wanted = ((sigmoid[1] - sigmoid[0]) + (sigmoid[1] - sigmoid[2])) / 2
    assert told["p_unsafe_difference"] == pytest.approx(wanted.item())
    assert told["verdict_agreement"] == 0.5
    p = reference.double().exp()
    kl = (p * (p.log() - found.double().log_softmax(-1))).sum(-1).mean()
    assert told["kl"] == pytest.approx(kl.item(), rel=1e-5)


# What is refused, and how.


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_llama().save_pretrained(folder)
    return folder


def refused(source: Path, place: Path, words: str, error: type[Exception] = ExportError) -> None:
    """Pruning fails with these words and leaves nothing."""
    with pytest.raises(error, match=words):
        prune(source, place / "out" / "small", PLAN, ROWS, VERDICT)
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def changed(sound: Path, place: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    folder = place / "changed"
    shutil.copytree(sound, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    sound: Path, tmp_path: Path, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed(sound, tmp_path, lambda state: state[name][3, 5].fill_(value))
    refused(source, tmp_path, f"{name} has weights that are not finite")


def test_a_missing_a_misshapen_and_a_foreign_tensor_are_named(sound: Path, tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.k_proj.weight"
    for at, (words, change) in enumerate(
        (
            (f"no tensor {name}", lambda state: state.pop(name)),
            (rf"{name} is \(47, 64\), config.json makes it \(48, 64\)",
             lambda state: state.update({name: state[name][:47].clone()})),
            (f"{name} is I64; convert", lambda state: state.update({name: state[name].long()})),
            ("x.bias is no tensor of the Llama",
             lambda state: state.update({"x.bias": torch.zeros(3)})),
        )
    ):  # fmt: skip
        source = changed(sound, tmp_path / str(at), change)
        refused(source, tmp_path / str(at), words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "mistral", "model_type"),
        ("architectures", ["LlamaForSequenceClassification"], "architectures"),
        ("hidden_size", "64", "hidden_size"),
        ("hidden_size", 2**40, "hidden_size"),
        ("num_hidden_layers", 10**5, "no tensor model.layers.4"),
        ("num_key_value_heads", 4, "multiple of num_key_value_heads"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope"),
        ("rope_theta", "x", "rope"),
        ("rms_norm_eps", -1.0, "rms_norm_eps"),
        ("quantization_config", {"bits": 4}, "quantized"),
        ("verdict_head", [1, 1], "verdict_head"),
        ("verdict_head", [1, 10**6], "verdict_head"),
    ],
)
def test_a_config_that_is_not_a_sound_llamas_is_refused(
    sound: Path, tmp_path: Path, field: str, value: Any, words: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(sound, folder)
    (folder / "config.json").write_text(json.dumps(config_of(sound) | {field: value}))
    refused(folder, tmp_path, words)


def test_truncated_and_pickled_weights_are_refused(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(sound, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, tmp_path, "not a whole safetensors file")
    weights.rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path, "pickles")


def test_nothing_is_written_over(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(FileExistsError):
        prune(sound, tmp_path / "small", PLAN, ROWS, VERDICT)


@pytest.mark.parametrize(
    ("plan", "rows", "head", "words"),
    [
        ({"layers": 5}, ROWS, VERDICT, "prune.layers is 5, must be 0 to 4"),
        ({"layers": 1, "keep_first": 1, "keep_last": 1}, ROWS, VERDICT, "keep_first"),
        ({"kv_groups": -1}, ROWS, VERDICT, "kv_groups"),
        ({"tokens": 3}, ROWS, VERDICT, "tokens"),
        ({}, ROWS[:11], VERDICT, "11 calibration rows"),
        ({}, [*ROWS[:11], [1, 2, 3]], VERDICT, "row 11"),
        ({}, [[10**6] * 9, *ROWS[1:]], VERDICT, "row 0"),
        ({}, ROWS, None, "name the verdict tokens"),
        ({}, ROWS, [1, 10**6], "head"),
    ],
)
def test_a_plan_rows_or_a_head_that_do_not_fit_are_refused(
    sound: Path,
    tmp_path: Path,
    plan: dict[str, Any],
    rows: list[list[int]],
    head: tuple[int, ...] | None,
    words: str,
) -> None:
    with pytest.raises(PruneError, match=words):
        prune(sound, tmp_path / "small", replaced(**plan), rows, head)
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_leaves_nothing_half_made(sound: Path, tmp_path: Path) -> None:
    with files_of_at_most(100_000):
        refused(sound, tmp_path, "too large", OSError)


def test_the_output_layer_is_not_needed_twice(tmp_path: Path) -> None:
    """A tied checkpoint may carry its output layer all the same."""
    source = saved(tiny_llama(tie_word_embeddings=True), tmp_path / "source")
    for path in source.glob("model*"):
        state = load_file(path) if path.suffix == ".safetensors" else {}
        if "model.norm.weight" in state:
            table = torch.zeros(VOCABULARY, 64)
            save_file({**state, HEAD: table}, path, {"format": "pt"})
            index = source / "model.safetensors.index.json"
            places = json.loads(index.read_text())
            places["weight_map"][HEAD] = path.name
            index.write_text(json.dumps(places))
    prune(source, tmp_path / "small", PLAN, ROWS, VERDICT)
    assert load_llama(tmp_path / "small").config.tie_word_embeddings
