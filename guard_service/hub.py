"""A model hub as it is to be trusted: what it lists is checked, what it sends is bounded.

The transport (retries, ranges, redirects, progress bars) is huggingface_hub's `http_get`, which
sends the token on to no other host. What it does not do is done here: it would write as many bytes
as the hub sends, and show text of the hub, in which the hub may have put the token.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, urlsplit

from guard_service.pulled import COMMIT, PLAIN_NAME, sha256_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
NEEDED = ("config.json", "tokenizer.json", "*.safetensors")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_WEIGHTS = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_WANTED = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|special_tokens_map)\.json"
    r"|tokenizer[A-Za-z0-9._-]*\.json|tokenizer\.model|chat_template\.(json|jinja)"
    r"|[A-Za-z0-9._-]+\.safetensors(\.index\.json)?"
    r"|(LICENSE|USE_POLICY)[A-Za-z0-9_-]*(\.txt|\.md)?|README\.md"
)
_LIST = "list of files"
_MAX_LISTING_BYTES, _MAX_FILES = 16 * 2**20, 256
_MAX_WEIGHT_BYTES, _MAX_OTHER_BYTES = 64 * 2**30, 64 * 2**20


class HubError(Exception):
    """The hub cannot be used, or not trusted. The text holds nothing that the hub wrote."""


class WrongContent(HubError):
    """A file is not what the hub's own listing says."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the hub lists it. Large files have a sha256, small ones git's sha1 of the blob."""

    name: str
    size: int
    sha256: str | None
    blob: str | None

    def check(self, path: Path) -> str:
        """The file's sha256, once its size and digest are as listed. Raises WrongContent."""
        size = path.stat().st_size
        if size != self.size:
            raise WrongContent(f"{self.name}: {size} bytes came, the hub lists {self.size}")
        found = sha256_of(path)
        if self.sha256 is not None:
            matches = found == self.sha256
        else:
            content = path.read_bytes()  # small: see _MAX_OTHER_BYTES
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            matches = blob.hexdigest() == self.blob
        if not matches:
            raise WrongContent(f"{self.name}: its digest is not the one that the hub lists")
        return found


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one commit: those that are wanted, and how many others there are."""

    commit: str
    files: tuple[Listed, ...]
    skipped: int


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub at https://..., or at http:// on this machine. Raises HubError for other addresses."""

    endpoint: str
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.endpoint)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        safe = parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)
        plain = re.fullmatch(r"[!-~]+", self.endpoint) and not re.search(r"[@?#\\]", self.endpoint)
        if not (host and safe and plain):
            raise HubError(
                "the endpoint must be https://HOST (http:// only for this machine), without user, "
                "password or query: over plain http anyone on the way could change what is pulled"
            )

    def page(self, repository: str) -> str:
        """The address that a person opens."""
        return f"{self.endpoint.rstrip('/')}/{repository}"

    def listing(self, repository: str, revision: str) -> Listing:
        """What a revision holds, with sizes and digests, and the commit that it is."""
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise HubError("the revision must be a commit, a branch or a tag")
        path = f"api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        with (
            tempfile.TemporaryFile(buffering=0) as raw,
            _Bounded(raw, _MAX_LISTING_BYTES, _LIST) as file,
        ):
            self._get(repository, path, file, _LIST)
            file.seek(0)
            return parse_listing(file.read(), repository, revision)

    def fetch(self, repository: str, commit: str, listed: Listed, path: Path) -> None:
        """Bring the file to its full size, going on where it ends. Its content is not checked."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            raw = io.FileIO(os.open(path, flags, 0o644), "r+")
        except OSError as error:
            raise HubError(f"{path}: cannot be written ({error.strerror})") from error
        with raw, _Bounded(raw, listed.size, listed.name) as file:
            have = file.seek(0, io.SEEK_END)
            if have > listed.size:
                file.truncate(0)
                have = file.seek(0)
            if have < listed.size:
                self._get(
                    repository, f"{repository}/resolve/{commit}/{listed.name}", file, listed.name
                )
            file.flush()
            os.fsync(file.fileno())

    def _get(self, repository: str, path: str, file: _Bounded, shown: str) -> None:
        library = _library()
        headers = library.utils.build_hf_headers(
            token=self.token or False,  # False: no token that lies elsewhere on this machine
            library_name="guard-service",
            headers={"accept-encoding": "identity"},  # sizes and ranges are of the file itself
        )
        try:
            library.file_download.http_get(
                f"{self.endpoint.rstrip('/')}/{path}",
                file,
                headers=headers,
                resume_size=file.tell(),
                displayed_filename=shown,
            )
        except (OSError, ValueError, RecursionError) as error:
            # The cause is left out: its text may hold what the hub wrote.
            raise HubError(f"{shown}: {self._reason(error, repository)}") from None

    def _reason(self, error: Exception, repository: str) -> str:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status in (401, 403):
            return self._gate(status, repository)
        if status == 404:
            return f"the hub has no such repository, revision or file (HTTP 404): {repository}"
        if status is not None and status >= 400:
            return f"the hub answers HTTP {status}; try again later"
        if type(error).__name__ == "OfflineModeIsEnabled":
            return "HF_HUB_OFFLINE is set; unset it to pull"
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            return f"cannot be written ({error.strerror})"
        kind = type(error).__name__
        return f"the connection to {self.endpoint} failed ({kind}); the same command goes on"

    def _gate(self, status: int, repository: str) -> str:
        given = "the token that was given may not" if self.token else "without a token one may not"
        return (
            f"{given} read {repository} (HTTP {status}). The model is gated: sign in at "
            f"{self.page(repository)} and accept its terms there, wait for the approval, then make "
            f"a token that may read it ({TOKENS_PAGE}) and give it with --token-file FILE or in "
            "HF_TOKEN"
        )


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EACCES)


class _Bounded(io.BufferedRandom):
    """A file that takes no more bytes than it should, whatever is sent."""

    def __init__(self, raw: io.FileIO, limit: int, shown: str) -> None:
        super().__init__(raw)
        self.limit, self.shown = limit, shown

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            raise WrongContent(f"{self.shown}: the hub sends more than {self.limit} bytes")
        return super().write(data)


def _library() -> ModuleType:
    """huggingface_hub, which is imported only to pull: nothing that serves needs it."""
    try:
        library = importlib.import_module("huggingface_hub")
        for name in ("constants", "file_download", "utils"):
            importlib.import_module(f"huggingface_hub.{name}")
    except ImportError:
        raise HubError(
            "pull needs the package huggingface_hub: pip install 'llama-guard-service[pull]'"
        ) from None
    if not library.__version__.startswith("0."):  # from 1.0 on its errors are of another kind
        raise HubError(
            f"pull needs huggingface_hub below 1.0, this is {library.__version__}: "
            "pip install 'llama-guard-service[pull]'"
        )
    library.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # would write past the bounds of _Bounded
    library.utils.logging.set_verbosity_error()  # its warnings hold addresses that the hub chose
    return library


def require_library() -> None:
    """Raises HubError, saying how to install it, when huggingface_hub is missing."""
    _library()


def check_repository(repository: str) -> None:
    """Raises HubError unless it is OWNER/NAME."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise HubError("the repository must be OWNER/NAME, such as meta-llama/Llama-Guard-3-1B")


def parse_listing(content: bytes, repository: str, revision: str) -> Listing:
    """Read what the hub says of a revision (its JSON). Raises HubError for all that is off."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise HubError("the hub's answer is not JSON; is this the address of a hub?") from None
    if not isinstance(document, dict) or not isinstance(document.get("siblings"), list):
        raise HubError("the hub's answer lists no files; is this the address of a hub?")
    commit = document.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubError("the hub does not say which commit this is")
    if COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(f"the hub answers with commit {commit}, not with {revision}")
    if document.get("id") != repository:
        raise HubError(
            f"the hub answers with another repository than {repository}; was it renamed?"
        )
    names = [_name(entry) for entry in document["siblings"]]
    files = tuple(
        _listed(name, entry)
        for name, entry in zip(names, document["siblings"], strict=True)
        if _WANTED.fullmatch(name) and PLAIN_NAME.fullmatch(name)
    )
    if len({file.name for file in files}) != len(files):
        raise HubError("the hub lists a file twice")
    if len(files) > _MAX_FILES:
        raise HubError(f"the hub lists {len(files)} files to pull, more than {_MAX_FILES}")
    found = {"*.safetensors" if _WEIGHTS.fullmatch(file.name) else file.name for file in files}
    if missing := [name for name in NEEDED if name not in found]:
        raise HubError(f"{repository} has no {', no '.join(missing)}: nothing here can use it")
    return Listing(commit, files, len(names) - len(files))


def _name(entry: Any) -> str:
    """A file's path in the repository: relative, and without steps upward."""
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or len(name) > 1024:
        raise HubError("the hub lists a file without a name")
    strange = not name.isprintable() or "\\" in name
    if strange or any(part in ("", ".", "..") for part in name.split("/")):
        raise HubError(f"the hub lists a file name that leads elsewhere: {ascii(name)[:60]}")
    return name


def _listed(name: str, entry: dict[str, Any]) -> Listed:
    lfs, size, blob = entry.get("lfs"), entry.get("size"), entry.get("blobId")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
    most = _MAX_WEIGHT_BYTES if _WEIGHTS.fullmatch(name) else _MAX_OTHER_BYTES
    if type(size) is not int or not 0 <= size <= most:
        raise HubError(f"{name}: the hub lists no size from 0 to {most} bytes")
    if lfs is None and isinstance(blob, str) and re.fullmatch(r"[0-9a-f]{40}", blob):
        if size > _MAX_OTHER_BYTES:
            raise HubError(f"{name}: too large for a file without a sha256")
        return Listed(name, size, None, blob)
    if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256):
        return Listed(name, size, sha256, None)
    raise HubError(f"{name}: the hub lists no digest, so it could not be verified")
