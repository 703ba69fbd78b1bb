"""Model folders: read as if a stranger had made them, and the room that new ones take."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard_quantization.export.decoder import ExportError
from guard_service.manifest import json_object

_MOST_JSON = 64 << 20  # bytes; the index of a large checkpoint takes some 100 KiB


def member(folder: Path, name: str) -> Path:
    """The regular file of that name in a folder. Raises ExportError, also for a name with a path.

    A link may lead to another file of the folder, or into the `blobs` of a Hugging Face cache whose
    snapshot the folder is; a link to anywhere else would carry a file of this machine along.
    """
    path = folder / name
    if Path(name).name != name:
        raise ExportError(f"{folder}: {name!r} is not the name of a file in this folder")
    if not path.is_file():
        raise ExportError(f"{path}: no such file; is the download complete?")
    root, real = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(map(real.is_relative_to, allowed)):
        raise ExportError(f"{path}: a link out of its folder; put the file there itself")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size, each key once. Raises ExportError naming the file."""
    path = member(path.parent, path.name)
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_JSON + 1)
        if len(content) > _MOST_JSON:
            raise ValueError(f"larger than {_MOST_JSON >> 20} MiB")
        return json_object(content)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """As Hugging Face writes its JSON, all of it or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    partial.replace(path)


def check_room(place: Path, needed: int) -> None:
    """Raises OSError when the file system of `place`, which may not be there yet, is too small."""
    there = next(one for one in (place, *place.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{_mib(needed)} MiB are needed, {_mib(free)} MiB are free; make room",
            str(place),
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
