"""An artifact's graph for one kernel plan, as an onnxruntime session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from guard_service.artifact import Artifact
from guard_service.engines import EngineFailed
from guard_service.engines.expanding import EIGHT_BITS, SEVEN_BITS, matrices
from guard_service.engines.graph_files import Tensor, UnreadableGraph, graph_tensors
from guard_service.engines.plans import EXPANDED, INT8, PLANS, STORED, graph_file
from guard_service.engines.prepared import DATA, GRAPH, Prepared, flags

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_WORTH_KEEPING = 64 * 2**20  # bytes of an artifact from which expanding takes a second or more
_MOST_GRAPH_BYTES = 64 * 2**20
_NO_SATURATION = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


@dataclass(frozen=True, slots=True)
class Graph:
    """A session, and the matrices it was given, whose memory stays theirs while it lives."""

    session: Any
    matrices: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def plans_of(artifact: Artifact) -> tuple[str, ...]:
    """Kernel plans that an artifact has graphs for."""
    files = artifact.manifest.files
    return tuple(plan for plan in PLANS if graph_file(plan) in files)


def device_for(wanted: str) -> str:
    """`cpu` or `cuda`, where `auto` takes what is there. Raises EngineFailed when it is not."""
    there = _CUDA in onnxruntime.get_available_providers()
    if wanted == "cuda" and not there:
        raise EngineFailed(
            "device cuda: this onnxruntime has no CUDA; install onnxruntime-gpu in its place"
        )
    return "cuda" if there and wanted != "cpu" else "cpu"


def open_graph(
    artifact: Artifact, plan: str, threads: int, prepared: Prepared, device: str = "cpu"
) -> Graph:
    """The plan's graph, ready to run. Raises EngineFailed when it cannot be loaded."""
    name = graph_file(plan)
    if device == "cuda" and plan == INT8:
        raise EngineFailed("kernel plan int8 is for processors; on CUDA take stored or fp32")
    if plan not in plans_of(artifact):
        raise EngineFailed(
            f"the artifact has no graph for kernel plan {plan!r}; "
            f"it has {', '.join(plans_of(artifact))}"
        )
    try:
        if plan == STORED:
            _tensors(artifact, name)  # refuses what takes weights from elsewhere
            return Graph(_session(artifact.folder / name, _options(threads), device))
        return _expanded(artifact, plan, threads, prepared, device)
    except (UnreadableGraph, OSError) as error:
        raise EngineFailed(f"{name} cannot be loaded: {error}") from error


def _expanded(
    artifact: Artifact, plan: str, threads: int, prepared: Prepared, device: str
) -> Graph:
    """A graph whose matrices are made now, or were on an earlier start."""
    keep = device == "cpu" and _all_bytes(artifact) >= _WORTH_KEEPING
    if keep:
        for _ in range(2):  # the second time after one that was damaged
            ready = prepared.graph(artifact.digest, plan) or prepared.make(
                artifact.digest, plan, lambda folder: _write(artifact, plan, threads, folder)
            )
            if ready is None:
                break
            try:
                return Graph(_session(ready, _options(threads)))
            except EngineFailed:
                prepared.drop(artifact.digest, plan)
    options, made = _fed(artifact, plan, threads)
    return Graph(_session(artifact.folder / graph_file(plan), options, device), made)


def _write(artifact: Artifact, plan: str, threads: int, folder: Path) -> None:
    """Let onnxruntime write the graph it would run, matrices packed as its kernels want them."""
    options, _matrices = _fed(artifact, plan, threads)
    options.optimized_model_filepath = str(folder / GRAPH)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    _session(artifact.folder / graph_file(plan), options)


def _fed(artifact: Artifact, plan: str, threads: int) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Options that bring the matrices which the plan's graph wants made, and these."""
    stored = {tensor.name: tensor for tensor in _tensors(artifact, graph_file(STORED))}
    wanted = [t for t in _tensors(artifact, graph_file(plan)) if t.location == EXPANDED]
    largest = EIGHT_BITS if _NO_SATURATION & flags() else SEVEN_BITS
    bits = 4 if artifact.manifest.quantization.scheme == "int4" else 8
    made = matrices(artifact.folder, stored, wanted, bits, largest)
    if made.keys() != {tensor.name for tensor in wanted}:
        raise UnreadableGraph("it wants a tensor that nobody can make")
    options = _options(threads)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in made.values()]
    options.add_external_initializers(list(made), values)
    return options, made


def _tensors(artifact: Artifact, name: str) -> list[Tensor]:
    path = artifact.folder / name
    if path.stat().st_size > _MOST_GRAPH_BYTES:
        raise UnreadableGraph("it is too large for a graph whose weights lie beside it")
    found = graph_tensors(path.read_bytes())
    allowed = artifact.manifest.files.keys() | ({EXPANDED} if name != graph_file(STORED) else set())
    if {tensor.location for tensor in found if tensor.location} - allowed:
        raise UnreadableGraph("it takes weights from a file that the manifest lacks")
    return found


def _all_bytes(artifact: Artifact) -> int:
    return sum(file.size for file in artifact.manifest.files.values())


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it keeps a plan for each shape of input, for ever
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(path: Path, options: Any, device: str = "cpu") -> Any:
    providers = [_CUDA, _CPU] if device == "cuda" else [_CPU]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no base class
        raise EngineFailed(f"{path.name} cannot be loaded: {error}") from error
