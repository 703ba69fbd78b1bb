"""A checkpoint as optimum exports it: the plain ONNX graph that fast graphs are checked against.

The graph is float32, takes keys and values of what came before, and gives logits of all positions.
A head that is cut to the tokens of verdicts stays cut: config.json then has `verdict_head`, the
token of each column.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from guard_quantization.checkpoint.streaming import load_llama
from guard_quantization.checkpoint.tensors import copy_companions, read_config
from guard_quantization.export.decoder import ExportError
from guard_quantization.folders import write_json
from guard_service.artifact import fresh_folder

Floats = NDArray[np.float32]
RECORD_FILE = "reference.json"
_LENGTHS = (1, 17, 60)  # of the rows that the export is checked on
_TOLERANCE = 1e-3  # of the largest logit


def export_reference(source: Path, out: Path) -> dict[str, Any]:
    """Export a checkpoint folder with optimum, and check the graph against torch.

    Returns what reference.json then says. Takes several times the memory of the float32 weights.
    Raises ExportError where optimum is not installed, the checkpoint is not a plain Llama, or the
    graph's logits are not torch's; FileExistsError when `out` exists.
    """
    config = read_config(source)
    convert = _optimum()
    with fresh_folder(out) as made:
        model = load_llama(source).requires_grad_(False).eval()
        with warnings.catch_warnings():  # of the tracer, about branches that inputs do not reach
            warnings.simplefilter("ignore")
            convert.onnx_export_from_model(
                model, made, task="text-generation-with-past", do_validation=False, opset=18
            )
        copy_companions(source, made)
        write_json(made / "config.json", config)
        record = {
            "format": "guard-reference/1",
            **_checked(made, model, config),
            "random_weights": bool(config.get("random_weights")),
            "versions": {name: version(name) for name in ("optimum", "optimum-onnx", "torch")},
        }
        write_json(made / RECORD_FILE, record)
    return record


class Reference:
    """An exported folder in onnxruntime. `head` is the token of each column of its logits."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Raises ExportError for a folder that is not such an export."""
        config = read_config(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._graph = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base class
            raise ExportError(f"{folder / 'model.onnx'} cannot be loaded: {error}") from error
        shapes = {value.name: value.shape for value in self._graph.get_inputs()}
        if not {"input_ids", "attention_mask"} <= shapes.keys():
            raise ExportError(f"{folder / 'model.onnx'}: not a graph that optimum exports")
        self._places = "position_ids" in shapes
        self._nothing = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }
        self.head: tuple[int, ...] = tuple(
            config.get("verdict_head") or range(config["vocab_size"])
        )

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits [tokens, head] of one row."""
        row = np.array([ids], np.int64)
        feeds = {"input_ids": row, "attention_mask": np.ones_like(row), **self._nothing}
        if self._places:
            feeds["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
        found: Floats = self._graph.run(["logits"], feeds)[0][0]
        return found


def _checked(folder: Path, model: Any, config: Mapping[str, Any]) -> dict[str, float]:
    """The largest difference between the graph's logits and torch's, and the largest logit."""
    reference = Reference(folder)
    rng = np.random.default_rng(0)
    apart = largest = 0.0
    for length in _LENGTHS:
        ids = rng.integers(0, config["vocab_size"], length).tolist()
        with torch.no_grad():
            wanted = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        apart = max(apart, float(np.abs(reference.logits(ids) - wanted).max()))
        largest = max(largest, float(np.abs(wanted).max()))
    if not apart <= _TOLERANCE * largest:
        raise ExportError(
            f"the exported graph's logits are up to {apart:.2g} from torch's, of which the largest "
            f"is {largest:.2g}; another version of optimum or torch may export it right"
        )
    return {"torch_difference": apart, "largest_logit": largest}


def _optimum() -> Any:
    try:
        return importlib.import_module("optimum.exporters.onnx")
    except ImportError:
        raise ExportError(
            "optimum is not installed: pip install 'llama-guard-service[reference]'"
        ) from None
