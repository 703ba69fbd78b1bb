"""A Llama's tensors in the Hugging Face layout: which there are, read and written one at a time.

Unlike `hf.Checkpoint`, which hands out float32 for export, tensors keep the dtype they are stored
in. A `config.json` may have `verdict_head`: the token ids, in order, to which the output layer's
rows were cut.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from guard_quantization.export.decoder import ExportError, Shape
from guard_quantization.export.hf import INDEX_FILE, SINGLE_FILE, Checkpoint

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHARD_BYTES = 2**30
# Files beside the weights that go along into a folder that is made of another.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "LICENSE.txt", "USE_POLICY.md"),
)
_MOST = 2**20  # no size in a config is larger
_MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that a checkpoint has or is to have."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPES

    @property
    def bytes(self) -> int:
        size: int = DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * size


class Tensors(Checkpoint):
    """Tensors of a safetensors folder in the dtype they are stored in; see `Checkpoint`."""

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file. Raises ExportError."""
        try:
            tensor: Tensor = self._file(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from error
        return tensor

    def entry(self, name: str) -> Entry:
        """Shape and dtype, from the file's header. Raises ExportError."""
        try:
            part = self._file(name).get_slice(name)
            return Entry(name, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from error

    def names(self) -> set[str]:
        """Every tensor that the folder says it has."""
        return set(self._places)

    def _file(self, name: str) -> Any:
        if name not in self._places:
            raise ExportError(
                f"{self.folder}: no tensor {name}, which config.json asks for; "
                "is the download complete, and is it a Llama?"
            )
        file = self._places[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def _unreadable(self, name: str, error: Exception) -> ExportError:
        file = self.folder / self._places[name]
        return ExportError(f"{file}: {name} cannot be read ({error}); download the file anew")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a plain Llama whose sizes make sense. Raises ExportError."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ExportError(f"{path}: larger than a configuration can be")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path}: not a JSON object")
    shape_of(config)
    return config


def shape_of(config: Mapping[str, Any]) -> Shape:
    """`Shape.of`, with every field checked that it reads. Raises ExportError naming the field."""
    names = config.get("architectures", ["LlamaForCausalLM"])
    if names != ["LlamaForCausalLM"]:
        raise ExportError(f"config.json: architectures is {names!r}, must be ['LlamaForCausalLM']")
    if config.get("quantization_config"):
        raise ExportError("config.json: the weights are quantized; take the float checkpoint")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    _check_sizes({name: config.get(name) for name in (*sizes, "vocab_size")})
    _check_sizes({name: config[name] for name in ("num_key_value_heads", "head_dim")
                  if config.get(name) is not None})  # fmt: skip
    try:
        shape = Shape.of(config)
        sound = bool(0 < shape.eps < 1) and all(map(math.isfinite, shape.frequencies))
    except ExportError:
        raise
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"config.json: rope or norm fields are not a Llama's: {error!r}") from (
            error
        )
    if not sound:
        raise ExportError("config.json: rms_norm_eps or the rope fields are out of range")
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ExportError(
            "config.json: num_attention_heads must be a multiple of num_key_value_heads, "
            "head_dim even"
        )
    _check_head(config.get("verdict_head"), shape)
    return shape


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value < _MOST:
            raise ExportError(f"config.json: {name} is {value!r}, must be a positive whole number")


def _check_head(head: Any, shape: Shape) -> None:
    if head is None:
        return
    sound = isinstance(head, list) and all(type(token) is int for token in head)
    if not sound or len(head) < 2 or len(set(head)) < len(head) or shape.tied:
        raise ExportError(
            "config.json: verdict_head must be a list of different token ids, in a checkpoint with "
            "an output layer of its own"
        )
    if not 0 <= min(head) <= max(head) < shape.vocab:
        raise ExportError("config.json: verdict_head names tokens that are not in the vocabulary")


def layout(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that config.json asks for."""
    s = shape_of(config)
    yield EMBEDDING, (s.vocab, s.hidden)
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    for layer in range(s.layers):
        for name, *shape in (
            ("input_layernorm", s.hidden),
            ("self_attn.q_proj", queries, s.hidden),
            ("self_attn.k_proj", keys, s.hidden),
            ("self_attn.v_proj", keys, s.hidden),
            ("self_attn.o_proj", s.hidden, queries),
            ("post_attention_layernorm", s.hidden),
            ("mlp.gate_proj", s.mlp, s.hidden),
            ("mlp.up_proj", s.mlp, s.hidden),
            ("mlp.down_proj", s.hidden, s.mlp),
        ):
            yield f"model.layers.{layer}.{name}.weight", tuple(shape)
    yield NORM, (s.hidden,)
    if not s.tied:
        yield HEAD, (len(config.get("verdict_head") or range(s.vocab)), s.hidden)


def parameters(config: Mapping[str, Any]) -> int:
    """How many weights a Llama of this config has."""
    return sum(math.prod(shape) for _, shape in layout(config))


def check_tensors(
    tensors: Tensors, config: Mapping[str, Any], done: Callable[[int], None] = lambda count: None
) -> list[Entry]:
    """The entries of `layout`, once every tensor is as config.json says and finite.

    Raises ExportError naming the first that is not. Reads each tensor once; `done` is told how many
    were.
    """
    found = []
    for name, wanted in layout(config):
        entry = tensors.entry(name)
        where = f"{tensors.folder}: {name}"
        if entry.shape != wanted:
            raise ExportError(f"{where} is {entry.shape}, config.json makes it {wanted}")
        if entry.dtype not in DTYPES:
            raise ExportError(f"{where} is {entry.dtype}; convert it to bfloat16 first")
        low, high = tensors.read(name).aminmax()  # both NaN where one weight is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ExportError(f"{where} has weights that are not finite; download it anew")
        found.append(entry)
        done(len(found))
    known = {entry.name for entry in found}
    odd = sorted(
        name for name in tensors.names() - known if not name.endswith("rotary_emb.inv_freq")
    )
    if odd and odd != [HEAD]:  # tied checkpoints may store the output layer again
        raise ExportError(f"{tensors.folder}: {odd[0]} is no tensor of the Llama in config.json")
    return found


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends well.

    Raises FileExistsError when `folder` exists: nothing is written over.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        made = Path(place) / folder.name
        made.mkdir()
        yield made
        made.rename(folder)


def write_tensors(
    folder: Path,
    entries: Sequence[Entry],
    make: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Write safetensors, in several files with an index when they are more than `shard_bytes`.

    `make` gives each tensor as it is written: one is held at a time. Raises OSError when the disk
    has not enough room, before anything is written.
    """
    total = sum(entry.bytes for entry in entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(
            errno.ENOSPC,
            f"the weights take {total / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; make room",
            str(folder),
        )
    shards = _shards(entries, shard_bytes)
    files = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE_FILE]
    written = 0
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_header(shard))
            for entry in shard:
                tensor = make(entry.name)
                assert tensor.shape == entry.shape and tensor.dtype == DTYPES[entry.dtype]
                out.write(tensor.contiguous().view(torch.uint8).numpy().data)
                written += 1
                done(written)
    if len(shards) > 1:
        places = {
            entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX_FILE, index)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and papers of a checkpoint; never code or weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """As Hugging Face writes its JSON, all of it or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    partial.replace(path)


def _shards(entries: Iterable[Entry], most: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.bytes > room:
            shards.append([])
            room = most
        shards[-1].append(entry)
        room -= entry.bytes
    return shards


def _header(shard: Sequence[Entry]) -> bytes:
    """The safetensors header: its length, then where each tensor lies, as JSON."""
    ends = [0]
    for entry in shard:
        ends.append(ends[-1] + entry.bytes)
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry, span in zip(shard, pairwise(ends), strict=True):
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": span,
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
