"""config.json of a checkpoint: the fields that are believed, each checked; all others are ignored.

Transformers is never shown the file itself, so that nothing in it can name code, other weights or
an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guard_service.artifact import ArtifactError
from guard_service.templates import BY_NAME

LLAMA, MLLAMA = "LlamaForCausalLM", "MllamaForConditionalGeneration"
TEMPLATE = "guard_template"  # a checkpoint of the user's own says what it was trained with
RANDOM = "random weights, not a guard: its verdicts mean nothing"
_BUILT = "Built with Llama"

_SIZES = {
    "vocab_size": (16, 2**20),
    "hidden_size": (8, 2**15),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "intermediate_size": (1, 2**18),
    "max_position_embeddings": (64, 2**22),
}
_VISION_SIZES = {
    "hidden_size": (8, 2**14),
    "num_hidden_layers": (1, 256),
    "num_global_layers": (1, 256),
    "attention_heads": (1, 1024),
    "intermediate_size": (1, 2**17),
    "vision_output_dim": (8, 2**18),
    "image_size": (4, 4096),
    "patch_size": (1, 256),
    "max_num_tiles": (1, 16),
    "num_channels": (3, 3),
}
_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a checkpoint's config.json says, in the field names of transformers."""

    architecture: str  # LLAMA or MLLAMA
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None  # None for LLAMA
    image_token: int  # the row of the embedding for an image; 0 for LLAMA
    template: str
    notice: str

    @property
    def vision_tiles(self) -> int:
        """Tiles that every image is computed with; 0 for LLAMA."""
        return int(self.vision["max_num_tiles"]) if self.vision is not None else 0


def read_geometry(content: bytes) -> Geometry:
    """Read config.json. Raises ArtifactError that names the field which is wrong."""
    config = read_object(content, "config.json")
    architectures = config.get("architectures")
    if architectures not in ([LLAMA], [MLLAMA]):
        raise _wrong("architectures", architectures, f"[{LLAMA!r}] or [{MLLAMA!r}]")
    for name in ("auto_map", "quantization_config", "verdict_head", "quantized"):
        if config.get(name):
            raise ArtifactError(
                f"config.json has {name}; what is served is a plain float checkpoint, without code"
            )
    sees = architectures == [MLLAMA]
    text = _text(_part(config, "text_config") if sees else config, sees)
    vision = _vision(_part(config, "vision_config")) if sees else None
    rows = text["vocab_size"] + 8  # of Mllama's embedding
    token = _whole(config, "image_token_index", 0, rows - 1) if sees else 0
    template = _template(config, sees, text["num_hidden_layers"])
    notice = RANDOM if config.get("random_weights") else "" if TEMPLATE in config else _BUILT
    return Geometry(architectures[0], text, vision, token, template, notice)


def read_object(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object. Raises ArtifactError."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{name} is not a JSON object")
    return document


def _template(config: Mapping[str, Any], sees: bool, layers: int) -> str:
    """The published model's that the geometry is of, unless the checkpoint names one."""
    if TEMPLATE not in config:
        text_only = "llama-guard-3-8b" if layers >= 32 else "llama-guard-3-1b"
        return "llama-guard-3-11b-vision" if sees else text_only
    named = config[TEMPLATE]
    fitting = [name for name, template in BY_NAME.items() if template.sees_images == sees]
    if named not in fitting:
        raise _wrong(TEMPLATE, named, f"one of {', '.join(fitting)}")
    return str(named)


def _text(config: Mapping[str, Any], sees: bool) -> dict[str, Any]:
    text: dict[str, Any] = {name: _whole(config, name, *span) for name, span in _SIZES.items()}
    text["rms_norm_eps"] = _real(config, "rms_norm_eps", 1e-12, 0.1)
    text |= _rope(config)
    _only(config, "hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        _only(config, name, False)
    heads = text["num_attention_heads"]
    if heads % text["num_key_value_heads"]:
        raise _wrong("num_attention_heads", heads, "a multiple of num_key_value_heads")
    if not sees and config.get("head_dim") is not None:
        text["head_dim"] = _whole(config, "head_dim", 2, 1024)
    elif text["hidden_size"] % heads:
        raise _wrong("hidden_size", text["hidden_size"], "a multiple of num_attention_heads")
    if text.get("head_dim", text["hidden_size"] // heads) % 2:
        raise ArtifactError("config.json: a head must have an even number of channels")
    if sees:
        most = text["num_hidden_layers"] - 1
        # The first layer attends to text: it tells transformers how much of it a cache holds.
        text["cross_attention_layers"] = _indices(config, "cross_attention_layers", 1, most)
    return text


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = {
        name: _whole(config, name, *span) for name, span in _VISION_SIZES.items()
    }
    vision["norm_eps"] = _real(config, "norm_eps", 1e-12, 0.1)
    _only(config, "hidden_act", "gelu")
    hidden, layers = vision["hidden_size"], vision["num_hidden_layers"]
    kept = _indices(config, "intermediate_layers_indices", 0, layers - 1)
    vision["intermediate_layers_indices"] = kept
    width = hidden * (1 + len(kept))
    if vision["vision_output_dim"] != width:
        raise _wrong("vision_output_dim", vision["vision_output_dim"], str(width))
    if hidden % vision["attention_heads"] or vision["image_size"] % vision["patch_size"]:
        raise ArtifactError("config.json: the vision sizes do not fit each other")
    tiles = range(1, vision["max_num_tiles"] + 1)
    ratios = [[a, b] for a in tiles for b in tiles if a * b <= vision["max_num_tiles"]]
    if config.get("supported_aspect_ratios") != ratios:
        found = config.get("supported_aspect_ratios")
        raise _wrong("supported_aspect_ratios", found, "all of max_num_tiles, in order")
    vision["supported_aspect_ratios"] = ratios
    return vision


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions, as transformers 4 writes them or as 5 does, in the form that both read."""
    both = config.get("rope_parameters")
    theta = both if isinstance(both, dict) else config
    found: dict[str, Any] = {"rope_theta": _real(theta, "rope_theta", 1.0, 1e9)}
    scaling = both if isinstance(both, dict) else config.get("rope_scaling")
    if scaling is None or (isinstance(scaling, dict) and scaling.get("rope_type") == "default"):
        return found | {"rope_scaling": {"rope_type": "default"}}
    if not isinstance(scaling, dict) or scaling.get("rope_type") != "llama3":
        raise _wrong("rope_scaling", scaling, "of rope_type llama3, or absent")
    numbers = {name: _real(scaling, name, 1e-3, 1e9) for name in _ROPE}
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise _wrong("high_freq_factor", numbers["high_freq_factor"], "over low_freq_factor")
    positions = int(numbers["original_max_position_embeddings"])
    scaled = numbers | {"rope_type": "llama3", "original_max_position_embeddings": positions}
    return found | {"rope_scaling": scaled}


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        raise _wrong(name, part, "an object")
    return part


def _whole(config: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = config.get(name)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _real(config: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value: Any = config.get(name)
    if type(value) not in (int, float) or not least <= value <= most:
        raise _wrong(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def _indices(config: Mapping[str, Any], name: str, least: int, most: int) -> list[int]:
    value: Any = config.get(name)
    sound = isinstance(value, list) and value and all(type(index) is int for index in value)
    if not sound or value != sorted(set(value)) or value[0] < least or value[-1] > most:
        raise _wrong(name, value, f"layers from {least} to {most}, in order, none twice")
    return list(value)


def _only(config: Mapping[str, Any], name: str, wanted: object) -> None:
    if config.get(name, wanted) != wanted:
        raise _wrong(name, config[name], f"{wanted!r}, or absent")


def _wrong(name: str, value: Any, wanted: str) -> ArtifactError:
    return ArtifactError(f"config.json: {name} is {ascii(value)[:60]}, must be {wanted}")
