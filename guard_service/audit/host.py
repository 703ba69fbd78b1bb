"""What scores may depend on, of a machine and its libraries: for whoever replays them elsewhere."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = ("onnxruntime", "torch", "transformers", "tokenizers", "numpy", "pillow")


def surroundings() -> dict[str, str]:
    """Processor and versions, by name. Names no host and no user."""
    found = {"cpu": _cpu(), "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
