"""Stages of a run: done once, recorded, resumed after an interruption, never written over.

A run folder holds one folder for each stage. While a stage works, its folder ends in `.part` and
keeps whatever the stage needs to go on; done, it is renamed. `stage.json` in it says what the stage
was made from and what came of it, and a stage whose record fits is not done again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD = "stage.json"
_PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "tokenizers", "safetensors")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

Figures = dict[str, Any]


class StaleStage(ValueError):
    """A stage's folder was made from something else than is asked for now."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a stage is made from: equal origins give equal results."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]  # name -> sha256

    @classmethod
    def of(cls, stage: str, plan: Any, inputs: Mapping[str, Path | str]) -> Origin:
        """`plan` is a dataclass or a mapping; an input is a digest, or a path to take it of."""
        settings = asdict(plan) if is_dataclass(plan) and not isinstance(plan, type) else plan
        found = {name: i if isinstance(i, str) else digest(i) for name, i in inputs.items()}
        return cls(stage, json.loads(json.dumps(settings)), found)


@dataclass(frozen=True, slots=True)
class Record:
    """What stands in `stage.json`."""

    origin: Origin
    seconds: float  # of the last, uninterrupted part
    peak_mib: float  # of resident memory; NaN where the system does not tell
    versions: Mapping[str, str]
    figures: Figures = field(default_factory=dict)


class Run:
    """The folder of one run. `say` is told, in a line, what is done and what is skipped.

    `names` are of stages whose folder is not called as they are.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None] = print,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self._say, self._names = folder, say, names or {}

    def place(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.folder / self._names.get(stage, stage)

    def stage(self, origin: Origin, make: Callable[[Path], Figures]) -> Path:
        """The stage's folder, made by `make(folder)` unless it is there already.

        `make` is called again with the same folder after an interruption and goes on from what
        it finds. Raises StaleStage when the folder, done or not, is of another origin.
        """
        done = self.place(origin.stage)
        part = done.with_name(f"{done.name}.part")
        for place in (done, part):
            if (place / RECORD).exists() and _origin(place / RECORD) != origin:
                raise StaleStage(
                    f"{place} was made from something else ({_difference(place, origin)}); take "
                    "another --runs folder, or delete it and the stages behind it"
                )
        if done.exists():
            if not (done / RECORD).exists():
                raise StaleStage(f"{done} has no {RECORD}; delete it, it is not of this program")
            self._say(f"{origin.stage}: done before")
            return done
        part.mkdir(parents=True, exist_ok=True)
        for draft in part.glob(".*-*"):  # of a process that was killed; see `fresh_folder`
            shutil.rmtree(draft)
        _write(part / RECORD, {"origin": asdict(origin)})
        try:
            record = _timed(origin, lambda: make(part))
        except BaseException:
            _leave(part)
            raise
        _write(part / RECORD, asdict(record))
        part.rename(done)
        self._say(f"{origin.stage}: done in {record.seconds:.0f} s, {record.peak_mib:.0f} MiB")
        return done

    def record(self, stage: str) -> dict[str, Any]:
        """What a finished stage recorded."""
        found: dict[str, Any] = json.loads((self.place(stage) / RECORD).read_text("utf-8"))
        return found


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's files, names and contents (without stage records)."""
    whole = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise FileNotFoundError(f"{path} is not there, or empty")
    for file in files:
        if file.name == RECORD:
            continue
        whole.update(f"{file.relative_to(path).as_posix()}\n".encode())
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def _leave(part: Path) -> None:
    """Remove a folder that has nothing in it to go on from."""
    if [path.name for path in part.iterdir()] == [RECORD]:
        (part / RECORD).unlink()
        part.rmdir()


def _timed(origin: Origin, make: Callable[[], Figures]) -> Record:
    _forget_peak()
    began = time.monotonic()
    figures = make()
    return Record(origin, time.monotonic() - began, _peak_mib(), _versions(), figures)


def _origin(path: Path) -> Origin:
    try:
        return Origin(**json.loads(path.read_text("utf-8"))["origin"])
    except (ValueError, KeyError, TypeError) as error:
        raise StaleStage(f"{path} cannot be read; delete the folder it is in") from error


def _difference(place: Path, wanted: Origin) -> str:
    """The names of the settings and inputs that differ."""
    found = _origin(place / RECORD)
    names = [
        name
        for kept, asked in ((found.settings, wanted.settings), (found.inputs, wanted.inputs))
        for name in sorted({*kept, *asked})
        if kept.get(name) != asked.get(name)
    ]
    return ", ".join(names) or "another stage"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1), "utf-8")
    partial.replace(path)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _forget_peak() -> None:
    with suppress(OSError):
        _CLEAR.write_text("5")  # Linux: the peak of resident memory begins anew (proc(5))


def _peak_mib() -> float:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
