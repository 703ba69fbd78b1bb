"""pulled.json: what a folder of a model hub's files is, and whether it still is that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guard_service.artifact import GOLDEN_FILE, SIGNATURE_FILE
from guard_service.manifest import File, json_object

PULLED_FILE = "pulled.json"
FORMAT = "llama-guard-pull/1"
COMMIT = re.compile(r"[0-9a-f]{40}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXTS = ("repository", "commit", "endpoint", "date")
_MAX_BYTES = 2**20


class PulledError(ValueError):
    """The folder's pulled.json cannot be read. The text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where a folder's files are from. The digests are of the files as they were verified."""

    repository: str
    commit: str
    endpoint: str
    date: str  # ISO 8601, UTC
    files: Mapping[str, File]

    def write(self, folder: Path) -> None:
        """Write pulled.json into the folder."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / PULLED_FILE).write_text(text + "\n", "utf-8")


def read_pulled(folder: Path) -> Pulled:
    """Read and check pulled.json. Raises PulledError."""
    path = folder / PULLED_FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise PulledError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise PulledError(f"{path}: too large")
    try:
        document = json_object(content)
    except ValueError as error:
        raise PulledError(f"{path}: {error}") from error
    if document.get("format") != FORMAT:
        raise PulledError(f"{path}: its format is not {FORMAT!r}")
    texts = {name: document[name] for name in _TEXTS if isinstance(document.get(name), str)}
    wrong = [name for name in _TEXTS if name not in texts]
    listed = document.get("files")
    if not isinstance(listed, dict) or not listed:
        wrong.append("files")
    elif not wrong:
        wrong += [
            f"files.{name[:60]}" for name, entry in listed.items() if not _is_file(name, entry)
        ]
    if wrong or not isinstance(listed, dict):
        raise PulledError(f"{path}: missing or wrong: {ascii(wrong[:5])}")
    return Pulled(**texts, files={name: File(**entry) for name, entry in listed.items()})


def _is_file(name: str, entry: Any) -> bool:
    return (
        PLAIN_NAME.fullmatch(name) is not None
        and isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def damage(folder: Path, pulled: Pulled) -> list[str]:
    """What is not as it was pulled: files changed, missing or added. Reads every byte.

    Golden scores are recorded after the pull, and signatures made.
    """
    known = {PULLED_FILE, GOLDEN_FILE, SIGNATURE_FILE, *pulled.files}
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name not in known)
    problems = [f"{ascii(name)[:60]}: was not pulled" for name in strange[:5]]
    problems += [f"and {len(strange) - 5} more"] if len(strange) > 5 else []
    for name, wanted in pulled.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing, or not a plain file")
        elif path.stat().st_size != wanted.size:
            problems.append(f"{name}: {path.stat().st_size} bytes, {wanted.size} were pulled")
        elif sha256_of(path) != wanted.sha256:
            problems.append(f"{name}: its sha256 is not that of the file that was pulled")
    return problems


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
