"""A Llama's tensors in the Hugging Face layout: which there are, read and written one at a time.

A `config.json` may have `verdict_head`: the token ids, in order, to which the output layer's rows
were cut.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from guard_quantization.export.decoder import ExportError, Shape
from guard_quantization.folders import check_room, member, read_json, write_json
from guard_service.manifest import json_object

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHARD_BYTES = 2**30
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Files beside the weights that go along into a folder that is made of another.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "LICENSE.txt", "USE_POLICY.md"),
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MOST = 2**20  # no size in a config is larger
_MOST_ROPE = 1e12
_MOST_HEADER = 100_000_000  # bytes; the library takes no more


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


class Tensors:
    """Tensors of a safetensors folder by name, read when asked for and not kept.

    Raises ExportError for a folder without safetensors (pickles are never read), for damaged files
    and for tensors that are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places = places_of(folder)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """The tensor in float32."""
        floats: NDArray[np.float32] = self.read(name).float().numpy()
        return floats

    def read(self, name: str) -> Tensor:
        """The tensor in the dtype it is stored in, mapped from its file."""
        try:
            tensor: Tensor = self._file(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from error
        return tensor

    def entry(self, name: str) -> Entry:
        """Shape and dtype, from the file's header."""
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
            self._open[file] = opened(member(self.folder, file))
        return self._open[file]

    def _unreadable(self, name: str, error: Exception) -> ExportError:
        file = self.folder / self._places[name]
        return ExportError(f"{file}: {name} cannot be read ({error}); download the file anew")


def places_of(folder: Path) -> dict[str, str]:
    """Which file of a safetensors folder holds each tensor. Raises ExportError."""
    if (folder / INDEX_FILE).exists():
        places = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict) or not all(map(_plain, places.values())):
            raise ExportError(f"{folder / INDEX_FILE}: weight_map must name files of this folder")
        return places
    if not (folder / SINGLE_FILE).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ExportError(
                f"{folder}: its weights ({pickles[0]}) are pickles, which can run code and are "
                "never read; take the model's safetensors, or convert them where that may be done"
            )
        raise ExportError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} here")
    return dict.fromkeys(opened(member(folder, SINGLE_FILE)).keys(), SINGLE_FILE)


def opened(path: Path, framework: str = "pt") -> Any:
    """A safetensors file whose header is sound. Raises ExportError.

    The library checks offsets and shapes, and takes the last of two tensors of one name; that
    header is refused here.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size <= _MOST_HEADER:
                json_object(file.read(size))
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            f"{path}: not a whole safetensors file ({error}); download it anew"
        ) from error


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_config(folder: Path, *, codes: bool = False) -> dict[str, Any]:
    """config.json of a plain Llama whose sizes make sense. Raises ExportError.

    With `codes` it may be of a folder that the quantize stage made.
    """
    config = _with_plain_rope(read_json(folder / "config.json"))
    if config.get("quantization_config") and not codes:
        raise ExportError(
            f"{folder / 'config.json'}: the weights are quantized; take the float checkpoint"
        )
    try:
        shape_of(config)
    except ExportError as error:
        raise ExportError(f"{folder}/{error}") from error
    return config


def _with_plain_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes as `rope_parameters`, in the fields of before."""
    told = config.pop("rope_parameters", None)
    if not isinstance(told, dict):
        return config
    theta = told.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = {name: value for name, value in told.items() if name != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {**config, "rope_theta": theta, "rope_scaling": None if plain else scaling}


def shape_of(config: Mapping[str, Any]) -> Shape:
    """`Shape.of`, with every field checked that it reads. Raises ExportError naming the field."""
    names = config.get("architectures", ["LlamaForCausalLM"])
    if names != ["LlamaForCausalLM"]:
        raise ExportError(
            f"config.json: architectures is {_short(names)}; only ['LlamaForCausalLM'] can be read "
            "here, as Llama Guard 3 1B and 8B are"
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    _check_sizes({name: config.get(name) for name in (*sizes, "vocab_size")})
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    _check_sizes({name: config[name] for name in optional if config.get(name) is not None})
    _check_rope(config.get("rope_theta", 10000.0), config.get("rope_scaling"))
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
            raise ExportError(
                f"config.json: {name} is {_short(value)}, must be a whole number, 1 to {_MOST - 1}"
            )


def _check_rope(theta: Any, scaling: Any) -> None:
    fields = {"rope_theta": theta}
    if scaling is not None and not (isinstance(scaling, dict) and scaling):
        raise ExportError(f"config.json: rope_scaling is {_short(scaling)}, must be an object")
    if scaling and scaling.get("rope_type", scaling.get("type")) == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        fields |= {f"rope_scaling.{name}": scaling.get(name) for name in names}
        original = "original_max_position_embeddings"
        _check_sizes({f"rope_scaling.{original}": scaling.get(original)})
    for name, value in fields.items():
        if type(value) not in (int, float) or not 1 <= value <= _MOST_ROPE:
            raise ExportError(
                f"config.json: {name} is {_short(value)}, must be a number of at least 1"
            )
    if len(fields) > 1 and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ExportError("config.json: rope_scaling.high_freq_factor must be above the low one")


def _short(value: Any) -> str:
    """A stranger's value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def stored_bytes(
    config: Mapping[str, Any], head_rows: int, bits: int, block: int, embedding_bits: int
) -> int:
    """Bytes of a Llama's weights as codes and float16 scales; norms and head are float32.

    `bits` is 4, 8 or 32 (float32); an embedding of 8 bits has one scale for each token.
    """
    hidden = shape_of(config).hidden
    total = 4 * head_rows * hidden
    for name, shape in layout(config):
        if name == HEAD:
            continue
        own, width = (embedding_bits, hidden) if name == EMBEDDING else (bits, block)
        width = block if own == 4 else width
        if len(shape) == 1 or own == 32:
            total += 4 * math.prod(shape)
        else:
            total += shape[0] * -(-shape[1] // width) * (width * own // 8 + 2)
    return total


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
    check_room(folder, total)
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
        if (source / name).exists():
            shutil.copyfile(member(source, name), folder / name)


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
