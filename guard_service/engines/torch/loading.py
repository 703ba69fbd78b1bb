"""From a checkpoint folder to transformers' model on its devices, every tensor checked first."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging as transformers_logging

from guard_service.artifact import ArtifactError
from guard_service.engines import EngineFailed
from guard_service.engines.torch.folder import Folder
from guard_service.engines.torch.geometry import Geometry

AUTO, STORED, INT8, INT4 = "auto", "stored", "int8", "int4"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED = ("BF16", "F16", "F32")
# Published checkpoints, and those that transformers saves, do not use the names of its modules.
_RENAMED = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_model|multi_modal_projector)\."), r"model.\1."),
)


def device_for(device: str) -> str:
    """`cpu` or `cuda`. Raises EngineFailed when CUDA is asked for and not there."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise EngineFailed(
            "torch has no CUDA device here; take --device cpu, or install its driver"
        )
    return "cuda" if there and device != "cpu" else "cpu"


def shapes_of(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of this geometry has; nothing is allocated."""
    kind = getattr(transformers, geometry.architecture)
    with torch.device("meta"):
        model = kind(_config(geometry))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_model(folder: Folder, device: str, dtype: str, weights: str) -> Any:
    """The model, ready to run, on `cpu` or over all GPUs (`cuda`).

    `dtype` is `bfloat16`, `float32` or `auto` (the first on CUDA, the second on the CPU, since only
    some have products of bfloat16). `weights` is `stored`, or `int8` or `int4` by bitsandbytes.
    Raises ArtifactError for tensors that are not the geometry's, EngineFailed when there is no room
    or a library is missing.
    """
    chosen = DTYPES[("bfloat16" if device == "cuda" else "float32") if dtype == AUTO else dtype]
    options: dict[str, Any] = {"dtype": chosen}
    if weights != STORED:
        options["quantization_config"] = _quantization(weights, chosen)
    if device == "cuda" or weights != STORED:
        several = device == "cuda" and torch.cuda.device_count() > 1
        options["device_map"] = "auto" if several else {"": device}
    state = _tensors(folder, shapes_of(folder.geometry))
    kind = getattr(transformers, folder.geometry.architecture)
    transformers_logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            None, config=_config(folder.geometry), state_dict=state, **options
        )
    except torch.OutOfMemoryError as error:
        raise EngineFailed(_NO_ROOM) from error
    except (ImportError, ValueError) as error:
        raise EngineFailed(f"transformers cannot load the model: {error}") from error
    if device == "cuda" and {"cpu", "disk"} & {*getattr(model, "hf_device_map", {}).values()}:
        raise EngineFailed(_NO_ROOM)
    return model.eval().requires_grad_(False)


_NO_ROOM = "the model does not fit on the GPUs; take --weights int8 or int4, or --device cpu"


def _config(geometry: Geometry) -> Any:
    if geometry.vision is None:
        return transformers.LlamaConfig(**geometry.text, pad_token_id=None)
    return transformers.MllamaConfig(
        text_config=dict(geometry.text, pad_token_id=None),
        vision_config=dict(geometry.vision),
        image_token_index=geometry.image_token,
    )


def _quantization(weights: str, dtype: torch.dtype) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line for each product
    kept = ["lm_head", "multi_modal_projector"]  # small, and read where nothing corrects them
    if weights == INT8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _tensors(folder: Folder, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every tensor by its module's name, mapped from its file, finite, of the wanted shape."""
    found: dict[str, Tensor] = {}
    for shard in folder.shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118  (it is no mapping)
                    name = _renamed(stored)
                    _check_header(file, stored, wanted.get(name), name in found)
                    found[name] = _finite(stored, file.get_tensor(stored))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{shard}: cannot be read ({error}); get it anew") from error
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ArtifactError(
            f"{folder.path}: {len(missing)} tensors are missing, {missing[0]} for one; is the "
            "download complete?"
        )
    return found


def _check_header(file: Any, name: str, wanted: tuple[int, ...] | None, twice: bool) -> None:
    part = file.get_slice(name)
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    shown = ascii(name)[:80]
    if wanted is None:
        raise ArtifactError(f"tensor {shown} is not one that config.json's geometry has")
    if twice:
        raise ArtifactError(f"tensor {shown} is there twice")
    if shape != tuple(wanted):
        raise ArtifactError(f"tensor {shown} is {list(shape)}, must be {list(wanted)}")
    if dtype not in _STORED:
        raise ArtifactError(f"tensor {shown} is {dtype}, must be one of {', '.join(_STORED)}")


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; its sum is finite exactly when all of it is, and takes no memory."""
    if not math.isfinite(tensor.sum(dtype=torch.float32).item()):
        raise ArtifactError(f"tensor {ascii(name)[:80]} holds a value that is no finite number")
    return tensor


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = pattern.sub(new, name, count=1)
    return name
