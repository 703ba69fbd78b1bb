"""A checkpoint in the Hugging Face layout: read strictly; no file but those named is opened."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from guard_service.artifact import TOKENIZER_FILE, ArtifactError
from guard_service.engines.torch.geometry import MLLAMA, Geometry, read_geometry, read_object
from guard_service.engines.torch.pixels import check_preprocessor
from guard_service.pulled import PULLED_FILE, PulledError, read_pulled, sha256_of

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_MOST_SHARDS = 256
_MOST_BYTES = {CONFIG_FILE: 2**20, PREPROCESSOR_FILE: 2**20, TOKENIZER_FILE: 64 * 2**20}
_MOST_OTHER_BYTES = 64 * 2**30


@dataclass(frozen=True, slots=True)
class Folder:
    """A checkpoint folder whose small files have been read and whose digests are known."""

    path: Path
    geometry: Geometry
    shards: tuple[Path, ...]
    digest: str  # "sha256:..." of the names and sha256 of every file that is used

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json."""
        return self.path / TOKENIZER_FILE


def read_folder(path: Path) -> Folder:
    """Read the small files and the digest of each, the weights too, as pulled where that is known.

    Raises ArtifactError that says what is wrong, and what to do.
    """
    try:
        root = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path}: no such folder") from error
    geometry = read_geometry(_content(root, CONFIG_FILE))
    names = [CONFIG_FILE, TOKENIZER_FILE]
    if geometry.architecture == MLLAMA and (root / PREPROCESSOR_FILE).exists():
        stated = read_object(_content(root, PREPROCESSOR_FILE), PREPROCESSOR_FILE)
        check_preprocessor(geometry, stated)
        names.append(PREPROCESSOR_FILE)
    shards = _shards(root)
    digests = _digests(root, [*names, *shards])
    _check_pulled(root, digests)
    told = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    digest = "sha256:" + hashlib.sha256(told.encode()).hexdigest()
    return Folder(root, geometry, tuple(root / name for name in shards), digest)


def _shards(root: Path) -> list[str]:
    """Names of the files that hold the weights."""
    if not (root / INDEX_FILE).exists():
        if (root / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        if any(any(root.glob(pattern)) for pattern in _PICKLES):
            raise ArtifactError(
                f"{root}: its weights are pickles, which can run code and are never read; "
                "convert them to safetensors"
            )
        raise ArtifactError(f"{root}: neither {SINGLE_FILE} nor {INDEX_FILE} here")
    places = read_object(_content(root, INDEX_FILE), INDEX_FILE).get("weight_map")
    named = places.values() if isinstance(places, dict) else ()
    if not named or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in named):
        raise ArtifactError(f"{INDEX_FILE}: weight_map must name .safetensors files of this folder")
    shards = sorted(set(named))
    if len(shards) > _MOST_SHARDS:
        raise ArtifactError(f"{INDEX_FILE}: names more than {_MOST_SHARDS} files")
    return shards


def _digests(root: Path, names: list[str]) -> dict[str, str]:
    paths = [_inside(root, name) for name in names]
    try:
        with ThreadPoolExecutor(4) as threads:  # gigabytes; hashing lets other threads run
            return dict(zip(names, threads.map(sha256_of, paths), strict=True))
    except OSError as error:
        raise ArtifactError(f"{error.filename or root}: cannot be read") from error


def _check_pulled(root: Path, digests: dict[str, str]) -> None:
    """Every file that is used is as it was pulled, if it was."""
    if not (root / PULLED_FILE).exists():
        return
    try:
        known = read_pulled(root).files
    except PulledError as error:
        raise ArtifactError(str(error)) from error
    wrong = [name for name, sha256 in digests.items()
             if name not in known or known[name].sha256 != sha256]  # fmt: skip
    if wrong:
        raise ArtifactError(
            f"{root}: not as it was pulled: {', '.join(wrong[:5])}; move it away, pull it anew"
        )


def _content(root: Path, name: str) -> bytes:
    try:
        return _inside(root, name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{root / name}: cannot be read ({error.strerror})") from error


def _inside(root: Path, name: str) -> Path:
    """The regular file of that name; links are followed, but not out of the folder."""
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{root / name}: is missing; get the folder anew") from error
    if not path.is_relative_to(root):
        raise ArtifactError(f"{root / name}: a link out of the folder; copy it (cp -rL)")
    if not path.is_file():
        raise ArtifactError(f"{root / name}: not a file")
    if path.stat().st_size > _MOST_BYTES.get(name, _MOST_OTHER_BYTES):
        raise ArtifactError(f"{root / name}: too large")
    return path
