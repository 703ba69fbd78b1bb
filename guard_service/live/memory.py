"""Whether there is room for a second model beside the first, before it is loaded."""

from __future__ import annotations

from pathlib import Path

from guard_service.artifact import MANIFEST_FILE
from guard_service.cgroups import ControlGroups
from guard_service.engines.plans import FP32, INT8, STORED

# What a model takes while it is loaded, for each byte of its files: matrices of 4 bits that are
# made 8 or 32, once more while they are packed for the kernels, and buffers for a run.
TIMES = {STORED: 1.5, INT8: 3.5, FP32: 9.0}
CHECKPOINT_TIMES = 2.2  # bfloat16 in its files, float32 in memory
MIB = 2**20


class NoRoom(MemoryError):
    """There is not enough memory to load a model beside those that run."""


def check_room(folder: Path, plan: str, free_bytes: int | None = None) -> None:
    """Raise NoRoom unless a model of this kernel plan can be loaded, by a safe estimate."""
    files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    artifact = (folder / MANIFEST_FILE).exists()
    times = TIMES.get(plan, max(TIMES.values())) if artifact else CHECKPOINT_TIMES
    needed = int(files * times)
    free = ControlGroups().free_bytes() if free_bytes is None else free_bytes
    if needed > free:
        raise NoRoom(
            f"{folder.name} may take {needed // MIB} MiB to load and {free // MIB} MiB are free; "
            "give the service more memory, or restart it with the new model"
        )
