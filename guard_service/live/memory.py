"""Whether there is room for a second model beside the first, before it is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from guard_service.artifact import MANIFEST_FILE
from guard_service.cgroups import ControlGroups
from guard_service.engines.plans import FP32, INT8, STORED

# What a model takes while it is loaded, for each byte of its files: matrices of 4 bits that are
# made 8 or 32, once more while they are packed for the kernels, and buffers for a run.
TIMES = {STORED: 1.5, INT8: 3.5, FP32: 9.0}
CHECKPOINT_TIMES = 2.2  # bfloat16 in its files, float32 in memory
# On a GPU, by what its weights are made; with room for a run.
GPU_TIMES = {"stored": 1.15, "int8": 0.7, "int4": 0.45}
MIB = 2**20


class NoRoom(MemoryError):
    """There is not enough memory to load a model beside those that run."""


def check_room(folder: Path, plan: str, weights: str, free_bytes: int | None = None) -> None:
    """Raise NoRoom unless a model can be loaded, by a safe estimate: an artifact by its kernel
    plan, a checkpoint by its weights, on the GPU where the model of before is on one."""
    files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    free = ControlGroups().free_bytes() if free_bytes is None else free_bytes
    if (folder / MANIFEST_FILE).exists():
        times = TIMES.get(plan, max(TIMES.values()))
    elif (on_gpu := _gpu_free_bytes()) is not None:
        times, free = GPU_TIMES[weights], on_gpu
    else:
        times = CHECKPOINT_TIMES
    needed = int(files * times)
    if needed > free:
        raise NoRoom(
            f"{folder.name} may take {needed // MIB} MiB to load and {free // MIB} MiB are free; "
            "give the service more memory, or restart it with the new model"
        )


def _gpu_free_bytes() -> int | None:
    """What torch can still have of the GPU that it uses; None where it uses none."""
    torch: Any = sys.modules.get("torch")  # loaded only with a checkpoint
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
