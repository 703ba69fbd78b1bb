"""A model folder: read strictly and verified before anything in it is used, or written once.

The folder holds guard.json, the files it lists, and nothing else but documents (DOCUMENTS), which
are never opened. A file it does not list is refused, because a graph could name it as weights. A
link may be followed only within the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from guard_service.manifest import File, Manifest, ManifestError, parse_manifest

STARTER = "starter"  # name of the artifact that is part of this package
MANIFEST_FILE = "guard.json"
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
GOLDEN_FILE = "golden.json"  # of checkpoints; an artifact has golden scores in its manifest
SIGNATURE_FILE = "guard.sig"  # of the manifest (security/signatures.py)
DOCUMENTS = frozenset({"MODEL_CARD.md", "README.md", "LICENSE", "NOTICE", "NOTICE.txt"})
_MAX_BYTES = {MANIFEST_FILE: 4 * 2**20, MODEL_FILE: 2**30, TOKENIZER_FILE: 64 * 2**20}
_MAX_OTHER_BYTES = 64 * 2**30


class ArtifactError(ValueError):
    """The folder cannot be served. The text says what is wrong with it, and the cure."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified folder."""

    folder: Path
    manifest: Manifest
    digest: str  # "sha256:..." of the manifest

    @property
    def model(self) -> Path:
        """The ONNX graph; its weights lie in files beside it."""
        return self.folder / MODEL_FILE

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json."""
        return self.folder / TOKENIZER_FILE


def load(folder: Path) -> Artifact:
    """Read and verify a folder: schema, files, sizes, sha256 of each. Raises ArtifactError."""
    try:
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{folder}: no such folder") from error
    path = root / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: no {MANIFEST_FILE} here; a Hugging Face folder has to be exported first "
            "(guard-quantize export)"
        )
    try:
        manifest = parse_manifest(_content(root, MANIFEST_FILE))
    except ManifestError as error:
        listed = "\n".join(f"  - {problem}" for problem in error.problems)
        raise ArtifactError(
            f"{path} is not a manifest this version can serve:\n{listed}"
        ) from error
    problems = _strangers(root, manifest) + _damage(root, manifest)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ArtifactError(f"{folder} is not what its manifest says; get it anew:\n{listed}")
    return Artifact(root, manifest, manifest.digest)


def named_folder(model: str | Path) -> Path:
    """A model's folder: the starter's by its name, any other as it is."""
    if model != STARTER:
        return Path(model)
    return Path(str(resources.files("guard_service"))) / "models" / STARTER


def load_named(model: str | Path) -> Artifact:
    """`load`, of the starter too, by its name."""
    return load(named_folder(model))


@contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends well.

    Raises FileExistsError when `folder` exists: nothing is written over.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        made = Path(place) / folder.name
        made.mkdir()
        yield made
        made.rename(folder)


def write_artifact(folder: Path, manifest: Manifest, files: Mapping[str, Path]) -> Artifact:
    """Make a folder from a manifest (its `files` are filled in) and copies of the files.

    It appears whole or not at all. Raises FileExistsError when `folder` exists.
    """
    with fresh_folder(folder) as draft:
        for name, source in files.items():
            shutil.copyfile(source, draft / name)
        seal(draft, manifest)
    return load(folder)


def seal(folder: Path, manifest: Manifest) -> Artifact:
    """Write the manifest into a folder of finished files; its `files` are filled in."""
    listed = {
        path.name: File(path.stat().st_size, _sha256(path))
        for path in sorted(folder.iterdir())
        if path.name not in {MANIFEST_FILE, SIGNATURE_FILE, *DOCUMENTS}
    }
    document = replace(manifest, files=listed).document()
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", "utf-8")
    return load(folder)


def _strangers(root: Path, manifest: Manifest) -> list[str]:
    known = {MANIFEST_FILE, SIGNATURE_FILE, *manifest.files, *DOCUMENTS}
    strange = sorted(entry.name for entry in root.iterdir() if entry.name not in known)
    named = [f"{ascii(name)[:60]}: not in the manifest; remove it" for name in strange[:5]]
    return named + ([f"and {len(strange) - 5} more"] if len(strange) > 5 else [])


def _damage(root: Path, manifest: Manifest) -> list[str]:
    needed = [name for name in (MODEL_FILE, TOKENIZER_FILE) if name not in manifest.files]
    problems = [f"{name}: not in the manifest" for name in needed]
    for name, wanted in manifest.files.items():
        try:
            path = _inside(root, name)
            size = path.stat().st_size
            if size != wanted.size:
                problems.append(f"{name}: {size} bytes, the manifest says {wanted.size}")
            elif _sha256(path) != wanted.sha256:
                problems.append(f"{name}: its sha256 is not the manifest's")
        except (ArtifactError, OSError) as error:
            problems.append(f"{name}: {error.strerror if isinstance(error, OSError) else error}")
    return problems


def _inside(root: Path, name: str) -> Path:
    """The regular file of that name; links are followed, but not out of the folder."""
    path = (root / name).resolve(strict=True)
    if not path.is_relative_to(root):
        raise ArtifactError("a link out of the folder")
    if not path.is_file():
        raise ArtifactError("not a file")
    if path.stat().st_size > _MAX_BYTES.get(name, _MAX_OTHER_BYTES):
        raise ArtifactError("too large")
    return path


def _content(root: Path, name: str) -> bytes:
    try:
        return _inside(root, name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{root / name}: cannot be read ({error.strerror})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
