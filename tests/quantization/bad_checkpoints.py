"""Ways in which a checkpoint folder can be wrong, each with what is said about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantization.verdict_tokenizer import verdict_tokenizer

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TOKENIZER = "tokenizer.model"
UP = "model.layers.1.mlp.up_proj.weight"
Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """`spoil` changes a sound folder; all of `said`, a regular expression, must be told."""

    name: str
    spoil: Spoil
    said: str


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def content(file: str, data: bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(data)


def cut(file: str, size: int) -> Spoil:
    """The file's first `size` bytes; of all but the last where it is negative."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Another safetensors header in front of the same data."""

    def spoil(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], "little")
        described = json.loads(data[8 : 8 + size])
        change(described)
        write_header(folder, json.dumps(described), data[8 + size :])

    return spoil


def write_header(folder: Path, text: str, data: bytes) -> None:
    raw = text.encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def twice_in_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].decode().strip()
    entry = json.dumps({UP: json.loads(text)[UP]})
    write_header(folder, f"{text[:-1]},{entry[1:]}", data[8 + size :])


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, {"format": "pt"})

    return spoil


def weight(value: float) -> Spoil:
    return tensors(lambda state: state[UP][3, 5].fill_(value))


def index(places: object) -> Spoil:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def all_in(folder: Path, file: str) -> dict[str, str]:
    return dict.fromkeys(load_file(folder / WEIGHTS), file)


def without(file: str) -> Spoil:
    return lambda folder: (folder / file).unlink()


def as_pickle(name: str) -> Spoil:
    return lambda folder: (folder / WEIGHTS).rename(folder / name)


def led_out(file: str) -> Spoil:
    """The file lies outside, a link inside."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / f"elsewhere-{file}"
        (folder / file).rename(outside)
        (folder / file).symlink_to(outside)

    return spoil


def pipe(file: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return spoil


def plain_tokenizer(folder: Path) -> None:
    """A tokenizer.json without any special token."""
    document = json.loads(verdict_tokenizer().to_str())
    document["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document))


def huge(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as file:
        file.truncate((64 << 20) + 1)


OTHERS = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "llama-4": {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
    "mllama": {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"},
}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2}

CONFIGS = [
    *(Bad(name, config(**said), rf"config\.json: architectures is \['{said['architectures'][0]}'\]")
      for name, said in OTHERS.items()),
    Bad("gpt-2", content(CONFIG, json.dumps(GPT2).encode()), "GPT2LMHeadModel"),
    Bad("another-type", config(model_type="mistral"), r"config\.json: model_type is 'mistral'"),
    Bad("quantized-by-others", config(quantization_config={"quant_method": "awq"}), "quantized"),
    Bad("no-config", without(CONFIG), r"config\.json: no such file"),
    Bad("config-is-a-pipe", pipe(CONFIG), r"config\.json: no such file"),
    Bad("config-cut", cut(CONFIG, 40), r"config\.json: not JSON"),
    Bad("config-empty", content(CONFIG, b""), r"config\.json: not JSON"),
    Bad("config-not-utf-8", content(CONFIG, b"\xff\xfe{"), r"config\.json: not JSON"),
    Bad("config-a-list", content(CONFIG, b"[]"), r"config\.json: not a JSON object"),
    Bad("config-nested", content(CONFIG, b'{"a":' + b"[" * 10**5), r"config\.json: not JSON"),
    Bad("config-key-twice", content(CONFIG, b'{"vocab_size": 1, "vocab_size": 2}'), "twice"),
    Bad("config-nan", content(CONFIG, b'{"rms_norm_eps": NaN}'), "NaN is not a number"),
    Bad("config-huge", huge, r"config\.json: larger than 64 MiB"),
    Bad("vast-width", config(hidden_size=10**9), "hidden_size is 1000000000"),
    Bad("vast-depth", config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    Bad("vast-vocabulary", config(vocab_size=10**9), "vocab_size is 1000000000"),
    Bad("large-width", config(hidden_size=10**6), r"embed_tokens.weight is \(\d+, 64\)"),
    Bad("many-layers", config(num_hidden_layers=10**6), r"no tensor model\.layers\.2"),
    Bad("width-of-text", config(hidden_size="64"), "hidden_size is '64'"),
    Bad("no-width", config(hidden_size=None), "hidden_size is None"),
    Bad("positions-of-text", config(max_position_embeddings="many"), "max_position_embeddings"),
    Bad("no-rope-factor", config(rope_scaling={"rope_type": "llama3"}), "rope"),
    Bad("rope-of-another-kind", config(rope_scaling={"rope_type": "yarn"}), "'yarn'"),
    Bad("negative-eps", config(rms_norm_eps=-1.0), "rms_norm_eps"),
    Bad("head-twice", config(verdict_head=[1, 1]), "verdict_head"),
]  # fmt: skip

FILES = [
    Bad("header-cut", cut(WEIGHTS, 100), "not a whole safetensors file.*download it anew"),
    Bad("no-header", cut(WEIGHTS, 4), "not a whole safetensors file"),
    Bad("empty", cut(WEIGHTS, 0), "not a whole safetensors file"),
    Bad("data-cut", cut(WEIGHTS, -100), "not a whole safetensors file"),
    Bad("vast-header", content(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), "not a whole"),
    Bad("header-no-json", content(WEIGHTS, b"\x09" + b"\0" * 7 + b"not json!"), "not a whole"),
    Bad("overlap", header(lambda h: h[UP].update(data_offsets=[0, 96 * 64 * 4])), "not a whole"),
    Bad("beyond-the-end", header(lambda h: h[UP].update(data_offsets=[2**40, 2**40 + 24576])),
        "not a whole"),
    Bad("backwards", header(lambda h: h[UP].update(data_offsets=[9, 3])), "not a whole"),
    Bad("vast-shape", header(lambda h: h[UP].update(shape=[2**40, 2**40])), "not a whole"),
    Bad("negative-shape", header(lambda h: h[UP].update(shape=[-96, -64])), "not a whole"),
    Bad("unknown-dtype", header(lambda h: h[UP].update(dtype="Q4")), "not a whole"),
    Bad("twice-in-header", twice_in_header, "a key stands twice"),
    Bad("no-weights", without(WEIGHTS), f"neither {WEIGHTS} nor {INDEX}"),
    Bad("pickle", as_pickle("pytorch_model.bin"), r"\(pytorch_model\.bin\) are pickles.*convert"),
    Bad("pickle-of-meta", as_pickle("consolidated.00.pth"), r"\(consolidated\.00\.pth\)"),
    Bad("index-up", index({UP: f"../{WEIGHTS}"}), "weight_map must name files of this folder"),
    Bad("index-absolute", index({UP: f"/{WEIGHTS}"}), "weight_map must name files of this folder"),
    Bad("index-of-numbers", index({UP: 3}), "weight_map must name files of this folder"),
    Bad("index-a-list", index([UP]), "weight_map must name files of this folder"),
    Bad("index-cut", content(INDEX, b'{"weight_map": '), rf"{INDEX}: not JSON"),
    Bad("index-of-a-missing-file",
        lambda folder: index(all_in(folder, "lost.safetensors"))(folder),
        r"lost\.safetensors: no such file; is the download complete"),
    Bad("index-of-a-tensor-too-many",
        lambda folder: index(all_in(folder, WEIGHTS) | {"x.bias": WEIGHTS})(folder),
        r"x\.bias is no tensor of the Llama"),
    Bad("link-to-weights", led_out(WEIGHTS), "a link out of its folder"),
    Bad("link-to-config", led_out(CONFIG), "a link out of its folder"),
    Bad("link-to-tokenizer", led_out(TOKENIZER), "a link out of its folder"),
]  # fmt: skip

TENSORS = [
    Bad("missing", tensors(lambda state: state.pop(UP)), rf"no tensor {UP}, which config\.json"),
    Bad("too-many", tensors(lambda state: state.update({"x.bias": torch.zeros(3)})),
        r"x\.bias is no tensor of the Llama in config\.json"),
    Bad("misshapen", tensors(lambda state: state.update({UP: state[UP][:95].clone()})),
        rf"{UP} is \(95, 64\), config\.json makes it \(96, 64\)"),
    Bad("of-integers", tensors(lambda state: state.update({UP: state[UP].long()})),
        f"{UP} is I64; convert it to bfloat16"),
    Bad("nan", weight(float("nan")), f"{UP} has weights that are not finite"),
    Bad("inf", weight(float("inf")), f"{UP} has weights that are not finite"),
    Bad("minus-inf", weight(float("-inf")), f"{UP} has weights that are not finite"),
]  # fmt: skip

TOKENIZERS = [
    Bad("no-tokenizer", without(TOKENIZER), r"neither tokenizer\.json nor tokenizer\.model"),
    Bad("tokenizer-cut", content("tokenizer.json", b'{"model": '), r"tokenizer\.json is not JSON"),
    Bad("tokenizer-of-another-kind", content("tokenizer.json", b'{"model": {"type": "WordPiece"}}'),
        "not BPE"),
    Bad("ranks-cut", cut(TOKENIZER, 1000), "single bytes have no rank|of the ranks"),
    Bad("no-special-tokens", plain_tokenizer, "has no <|"),
]  # fmt: skip

ALL = [*CONFIGS, *FILES, *TENSORS, *TOKENIZERS]
