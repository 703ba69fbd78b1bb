"""A trained Llama made deeper and wider without changing what it computes.

Layers: behind each layer stand copies of it that add nothing yet, as their output projections are
zero (block expansion, LLaMA Pro: Wu et al., 2024). Neurons: new ones read the stream at random and
write nothing yet (function-preserving widening after Net2Net: Chen et al., 2016). The gradient
reaches the zeros first and all else from the second step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from guard_quantization.checkpoint.beliefs import TEMPLATE
from guard_quantization.checkpoint.tensors import Entry, layout, write_tensors
from guard_quantization.export.int4 import floats
from guard_quantization.export.stored import StoredModel
from guard_quantization.folders import write_json
from guard_service.artifact import TOKENIZER_FILE, Artifact, fresh_folder

_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_READERS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def grow_artifact(artifact: Artifact, folder: Path, layers: int, width: int, seed: int) -> None:
    """Write what an artifact computes as a checkpoint of `layers` layers and MLPs of `width`.

    Float32 in the Hugging Face layout, the output layer cut to the verdict's tokens; config.json
    names the template. Raises FileExistsError, ExportError, and ValueError when it would shrink.
    """
    stored, manifest = StoredModel(artifact), artifact.manifest
    before = {**stored.config, "verdict_head": list(manifest.verdict.head)}
    state = {name: torch.tensor(floats(stored[name])) for name, _ in layout(before)}
    made = grown(state, layers, width, seed)
    config = {
        **before,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        TEMPLATE: manifest.template,
    }
    entries = [Entry(name, shape, "F32") for name, shape in layout(config)]
    with fresh_folder(folder) as draft:
        write_json(draft / "config.json", config)
        (draft / TOKENIZER_FILE).write_bytes(artifact.tokenizer.read_bytes())
        write_tensors(draft, entries, lambda name: made[name])


def grown(state: Mapping[str, Tensor], layers: int, width: int, seed: int) -> dict[str, Tensor]:
    """Tensors of a Llama of `layers` layers and MLPs of `width` that computes what `state` does.

    Copies spread evenly over the layers. Raises ValueError when there would be fewer.
    """
    before = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    narrow = len(state[f"model.layers.0.{_READERS[0]}"])
    if layers < before or width < narrow:
        raise ValueError(
            f"a model of {before} layers and MLPs of {narrow} cannot grow to {layers} and {width}"
        )
    rng = torch.Generator().manual_seed(seed)
    made = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    done = -1
    for at in range(layers):
        origin = at * before // layers
        copied, done = origin == done, origin
        prefix = f"model.layers.{origin}."
        for name in (name for name in state if name.startswith(prefix)):
            short = name.removeprefix(prefix)
            tensor = torch.zeros_like(state[name]) if copied and short in _WRITERS else state[name]
            made[f"model.layers.{at}.{short}"] = _widened(short, tensor, width, rng)
    return made


def _widened(short: str, tensor: Tensor, width: int, rng: torch.Generator) -> Tensor:
    if short in _READERS:
        shape = (width - tensor.shape[0], tensor.shape[1])
        return torch.cat((tensor, torch.randn(shape, generator=rng) * tensor.std()))
    if short == _WRITERS[1]:
        return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], width - tensor.shape[1])), 1)
    return tensor.clone()
