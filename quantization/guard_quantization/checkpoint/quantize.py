"""The quantize stage: a float checkpoint folder in, a folder of codes and scales out.

Layer by layer: calibration rows run through the layers that are quantized already, so that each
layer is fitted to the inputs it will get (Frantar et al., 2022), and within a layer each group of
matrices to what the groups before it give. Memory: the embedding table, or one layer in float with
the second moments of its widest inputs, and the rows' states. Every part is a file, written when it
is finished; an interrupted run reads those that are there and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard_quantization.checkpoint.gptq import Fit, Hessian, fit_gptq, fit_nearest, row_errors
from guard_quantization.checkpoint.layerwise import GROUPS, NORMS, Chunk, Passage, chunks
from guard_quantization.checkpoint.quantize_plan import QuantizeError, QuantizePlan, select_rows
from guard_quantization.checkpoint.quantized import (
    FORMAT,
    MARK,
    QUANTIZATION_FILE,
    QuantizedCheckpoint,
    Shard,
    write_shard,
)
from guard_quantization.checkpoint.rotation import FloatWeights, Rotated
from guard_quantization.checkpoint.tensors import (
    EMBEDDING,
    HEAD,
    INDEX_FILE,
    NORM,
    Tensors,
    check_tensors,
    copy_companions,
    layout,
    read_config,
    stored_bytes,
)
from guard_quantization.export.decoder import Shape
from guard_quantization.export.int4 import Blocks, fake_quantize_rows, quantize_blocks
from guard_quantization.folders import check_room, read_json, write_json
from guard_quantization.stages import digest
from guard_quantization.training import Report

__all__ = ["QuantizeError", "QuantizePlan", "QuantizedCheckpoint", "quantize_checkpoint"]

Floats = NDArray[np.float32]
Parts = dict[str, Floats | Blocks]
_SAMPLED_ROWS = 4096  # of an embedding table, for its error


def quantize_checkpoint(
    source: Path,
    folder: Path,
    plan: QuantizePlan,
    calibration: Sequence[Sequence[int]] = (),
    report: Callable[[str, int], Report] = Report,
) -> dict[str, Any]:
    """Quantize the checkpoint folder `source` into the new folder `folder`; see `quantized`.

    `calibration` rows are token ids of whole prompts, in random order. Finished parts wait in
    `.NAME.work` beside `folder`, where the same call goes on; it becomes `folder` in the end.
    Returns, for each layer, every matrix's relative output error on the calibration rows (`error`,
    and that of round-to-nearest beside it: `nearest`; of the weights where there are no rows), what
    int8 activations cost each of its inputs, and its size in MiB.

    Raises ExportError for a checkpoint that is not a sound Llama, QuantizeError for a plan, rows or
    finished parts that do not go with it, FileExistsError, OSError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    config = read_config(source)
    shape = Shape.of(config)
    plan.check(shape)
    rows = select_rows(plan, calibration, shape.vocab)
    tensors = Tensors(source)
    with tensors:
        check_tensors(tensors, config)
        layouts = _layouts(plan, config)
        work = folder.with_name(f".{folder.name}.work")
        head = len(config.get("verdict_head") or range(shape.vocab))
        whole = stored_bytes(config, head, plan.bits, plan.block, plan.embedding_bits)
        check_room(folder, whole - sum(path.stat().st_size for path in work.glob("*")))
        _begin_in(work, _settings(source, plan, rows, layouts))
        view: FloatWeights = _Untied(tensors, shape.tied)
        if plan.rotate:
            view = Rotated(tensors, config, plan.seed)
        run = _Run(shape, plan, view, work, layouts, rows)
        figures = run.all(report("quantize", shape.layers + 2))
    _finish(source, work, config)
    work.rename(folder)
    sizes = {"mib_before": source, "mib": folder}
    return {
        **figures,
        **{name: _mib(place.glob("*.safetensors")) for name, place in sizes.items()},
    }


class _Untied:
    """A checkpoint that always has a head of its own."""

    def __init__(self, weights: FloatWeights, tied: bool) -> None:
        self._weights, self._tied = weights, tied

    def __getitem__(self, name: str) -> Floats:
        return self._weights[EMBEDDING if self._tied and name == HEAD else name]


@dataclass(frozen=True, slots=True)
class _Run:
    """The parts of one checkpoint in order: embedding, layers, head."""

    shape: Shape
    plan: QuantizePlan
    view: FloatWeights
    work: Path
    layouts: Mapping[str, Any]
    rows: Sequence[Sequence[int]]

    def all(self, report: Report) -> dict[str, Any]:
        """Make the parts that are missing; the figures of all of them."""
        layers = []
        try:
            shard = self._part("embedding", self._embedding)
            embedding = json.loads(shard.note) | {"mib": _mib([shard.path])}
            states = self._begin(shard[EMBEDDING])
            report.at(1, "embedding")
            passage = Passage(self.shape, max(map(len, self.rows), default=0))
            for at in range(self.shape.layers):
                shard = self._layer(at, passage, states)
                layers.append({"layer": at, **json.loads(shard.note), "mib": _mib([shard.path])})
                report.at(at + 2, f"layer {at}")
            self._part("head", lambda: ({name: self.view[name] for name in (NORM, HEAD)}, {}))
            report.at(self.shape.layers + 2, "head")
        finally:
            report.close()
        return {"embedding": embedding, "layers": layers}

    def _part(self, name: str, make: Callable[[], tuple[Parts, dict[str, Any]]]) -> Shard:
        """A finished part, read back from its file; made when there is none."""
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            tensors, figures = make()
            write_shard(path, tensors, json.dumps(figures))
        return Shard(path, self.layouts)

    def _embedding(self) -> tuple[Parts, dict[str, Any]]:
        table, bits = self.view[EMBEDDING], self.plan.embedding_bits
        if bits == 32:
            return {EMBEDDING: table}, {"error": 0.0}
        block = self.plan.block if bits == 4 else self.shape.hidden
        try:
            blocks = quantize_blocks(table, bits, block)
        except ValueError as error:
            raise QuantizeError(f"{EMBEDDING} cannot be quantized: {error}") from error
        some = np.linspace(0, len(table) - 1, min(len(table), _SAMPLED_ROWS)).astype(np.int64)
        sample = torch.from_numpy(table[some]).double()
        lost = row_errors(sample, blocks.take(some), None).sum() / (sample**2).sum()
        return {EMBEDDING: blocks}, {"error": float(lost) ** 0.5}

    def _begin(self, table: Floats | Blocks) -> list[Chunk]:
        """The rows' states in front of the first layer."""
        made = []
        for ids, lengths in chunks(self.rows):
            found = table.take(ids).dequantize() if isinstance(table, Blocks) else table[ids]
            made.append(Chunk(torch.from_numpy(found), lengths))
        return made

    def _layer(self, at: int, passage: Passage, states: list[Chunk]) -> Shard:
        """A layer's part; `states` go through the layer as it is in there."""
        prefix, file = f"model.layers.{at}.", f"layer-{at:03d}"
        norms = {name: self.view[f"{prefix}{name}.weight"] for name in NORMS}
        scales = torch.from_numpy(norms[NORMS[0]]), torch.from_numpy(norms[NORMS[1]])
        if (self.work / f"{file}.safetensors").exists():
            shard = Shard(self.work / f"{file}.safetensors", self.layouts)
            if states:
                passage.through(states, scales, lambda group, _: _stored(shard, prefix, group))
            return shard
        making = _Making(self.plan, self.view, prefix)
        if states:
            passage.through(states, scales, making.settle)
        else:
            for group in GROUPS:
                making.settle(group, ())
        parts: Parts = {f"{prefix}{name}.weight": norm for name, norm in norms.items()}
        parts |= {name: fit.blocks for name, fit in making.fits.items()}
        return self._part(file, lambda: (parts, making.figures()))


class _Making:
    """The matrices of one layer while they are fitted."""

    def __init__(self, plan: QuantizePlan, view: FloatWeights, prefix: str) -> None:
        self.plan, self.view, self.prefix = plan, view, prefix
        self.fits: dict[str, Fit] = {}
        self._int8: dict[str, float] = {}

    def settle(self, group: tuple[str, ...], inputs: Iterable[Tensor]) -> list[Tensor]:
        """Fit a group of matrices to the inputs that they share; their weights from now on."""
        hessian: Hessian | None = None
        lost = 0.0
        for x in inputs:
            hessian = hessian or Hessian(x.shape[1])
            hessian.add(x)
            if not hessian.total.diagonal().isfinite().all():
                raise QuantizeError(
                    f"{self.prefix}{group[0]}: on the calibration rows its inputs are not finite; "
                    "the checkpoint does not compute in float32"
                )
            lost += _int8_loss(x)
        if hessian:
            self._int8[group[0]] = lost / hessian.tokens
        made = []
        for short in group:
            name = f"{self.prefix}{short}.weight"
            self.fits[name] = fit = self._fit(name, hessian)
            made.append(torch.from_numpy(fit.blocks.dequantize()))
        return made

    def _fit(self, name: str, hessian: Hessian | None) -> Fit:
        plan, weight = self.plan, torch.from_numpy(self.view[name])
        try:
            if plan.method == "nearest" or hessian is None:
                total = hessian.total if hessian else None
                return fit_nearest(weight, total, plan.bits, plan.block)
            return fit_gptq(weight, hessian.total, plan.bits, plan.block, plan.damping)
        except ValueError as error:
            raise QuantizeError(f"{name} cannot be quantized: {error}") from error

    def figures(self) -> dict[str, Any]:
        """Errors of every matrix, and of every group's inputs in int8."""
        matrices = {
            name.removeprefix(self.prefix).removesuffix(".weight"): {
                "nearest": fit.nearest,
                "error": fit.error,
            }
            for name, fit in self.fits.items()
        }
        return {"matrices": matrices, "int8_inputs": self._int8}


def _stored(shard: Shard, prefix: str, group: tuple[str, ...]) -> list[Tensor]:
    made = []
    for short in group:
        found = shard[f"{prefix}{short}.weight"]
        assert isinstance(found, Blocks)
        made.append(torch.from_numpy(found.dequantize()))
    return made


def _int8_loss(x: Tensor) -> float:
    """Sum over tokens of the relative error of inputs that are int8 with one scale per token."""
    rows = x.numpy()
    lost = np.linalg.norm(fake_quantize_rows(rows) - rows, axis=1)
    return float((lost / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)).sum(dtype=np.float64))


def _layouts(plan: QuantizePlan, config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Bits and columns of each matrix that becomes codes."""
    matrices = {name: shape for name, shape in layout(config) if len(shape) == 2 and name != HEAD}
    bits = {name: plan.embedding_bits if name == EMBEDDING else plan.bits for name in matrices}
    return {
        name: {"bits": bits[name], "columns": shape[1]}
        for name, shape in matrices.items()
        if bits[name] != 32
    }


def _settings(
    source: Path, plan: QuantizePlan, rows: Sequence[Sequence[int]], layouts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the folder's bytes follow from, and how its matrices are laid out."""
    read = hashlib.sha256(json.dumps([list(map(int, row)) for row in rows]).encode()).hexdigest()
    return {
        "format": FORMAT,
        "plan": asdict(plan),
        "rotation": "R1 and R2, randomised Hadamard or orthogonal" if plan.rotate else "none",
        "source": digest(source),
        "calibration": {"rows": len(rows), "tokens": sum(map(len, rows)), "sha256": read},
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "tensors": layouts,
    }


def _begin_in(work: Path, settings: Mapping[str, Any]) -> None:
    """Mark the folder of finished parts. Raises QuantizeError when it is another run's."""
    stamp = work / QUANTIZATION_FILE
    if not stamp.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(stamp, settings)
    elif read_json(stamp) != json.loads(json.dumps(settings)):
        raise QuantizeError(
            f"{work} holds parts made from another checkpoint, plan, rows or versions; remove it "
            "to begin anew"
        )


def _finish(source: Path, work: Path, config: Mapping[str, Any]) -> None:
    """What stands beside the weights in a Hugging Face folder."""
    places: dict[str, str] = {}
    for file in sorted(work.glob("*.safetensors")):
        places |= dict.fromkeys(Shard(file, {}).names, file.name)
    write_json(work / INDEX_FILE, {"weight_map": places})
    write_json(work / "config.json", {**config, "tie_word_embeddings": False, **MARK})
    copy_companions(source, work)


def _mib(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 2**20
