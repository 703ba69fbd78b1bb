"""A checkpoint folder with quantized matrices: what is written, and how it is read back.

A quantized matrix NAME is two tensors: NAME.codes, uint8 as `Blocks.packed` lays them out, and
NAME.scales, float16. quantization.json says how they were made and lists bits and columns of each.
The rest is the Hugging Face layout. config.json has a quantization_config without a `quant_method`:
transformers refuses that, where it would fill in random weights for a method it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from guard_quantization.checkpoint.tensors import opened, places_of, read_config
from guard_quantization.export.decoder import ExportError
from guard_quantization.export.int4 import Blocks, unpack
from guard_quantization.folders import member, read_json

QUANTIZATION_FILE = "quantization.json"
MARK = {"quantization_config": {"layout": QUANTIZATION_FILE}}
FORMAT = 1
Floats = NDArray[np.float32]
_PARTS = ("codes", "scales")


def write_shard(path: Path, tensors: Mapping[str, Floats | Blocks], note: str) -> None:
    """Write tensors and a note into a safetensors file, all of it or nothing. Raises OSError."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Blocks):
            arrays[f"{name}.codes"] = np.ascontiguousarray(tensor.packed())
            arrays[f"{name}.scales"] = np.ascontiguousarray(tensor.scales)
        else:
            arrays[name] = np.ascontiguousarray(tensor)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(arrays, partial, metadata={"note": note})
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error}); make room and run again") from error
    partial.replace(path)


class Shard:
    """One file of `write_shard`, read tensor by tensor. Raises ExportError for a damaged one."""

    def __init__(self, path: Path, layouts: Mapping[str, Any]) -> None:
        self.path, self._layouts = path, layouts
        self._file = opened(path, "np")
        self.names: tuple[str, ...] = tuple(self._file.keys())
        self.note: str = (self._file.metadata() or {}).get("note", "")

    def __getitem__(self, name: str) -> Floats | Blocks:
        try:
            if name not in self._layouts:
                floats: Floats = self._file.get_tensor(name).astype(np.float32, copy=False)
                if not np.isfinite(floats).all():
                    raise ValueError("it has weights that are not finite")
                return floats
            codes, scales = (self._file.get_tensor(f"{name}.{part}") for part in _PARTS)
            layout = self._layouts[name]
            return unpack(codes, scales, layout["bits"], layout["columns"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{self.path}: {name} cannot be read ({error})") from error


class QuantizedCheckpoint:
    """Tensors of a quantized folder by their Hugging Face names, read when asked for.

    Quantized matrices come as Blocks, the others as float32. Raises ExportError for a folder that
    is not of this format, and when a tensor is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = read_json(folder / QUANTIZATION_FILE)
        if self.settings.get("format") != FORMAT or not _layouts(self.settings.get("tensors")):
            raise ExportError(f"{folder / QUANTIZATION_FILE}: not of format {FORMAT}")
        self.config = read_config(folder, codes=True)
        self._places = places_of(folder)
        self._shards: dict[str, Shard] = {}

    def __getitem__(self, name: str) -> Floats | Blocks:
        layouts = self.settings["tensors"]
        file = self._places.get(f"{name}.codes" if name in layouts else name)
        if file is None:
            raise ExportError(f"{self.folder}: no tensor {name}")
        if file not in self._shards:
            self._shards[file] = Shard(member(self.folder, file), layouts)
        return self._shards[file][name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self.settings["tensors"]


def _layouts(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(entry, dict)
        and entry.get("bits") in (4, 8)
        and type(entry.get("columns")) is int
        and entry["columns"] > 0
        for entry in found.values()
    )
