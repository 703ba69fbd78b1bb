"""guard-service pull: a gated model from a hub into a plain folder, verified before it is there."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from guard_service.hub import (
    Hub,
    HubError,
    Listed,
    Listing,
    WrongContent,
    check_repository,
    require_library,
)
from guard_service.manifest import File
from guard_service.pulled import COMMIT, PULLED_FILE, Pulled, PulledError, damage, read_pulled

DEFAULT_ENDPOINT = "https://huggingface.co"
FAILED, INTERRUPTED = 1, 130
_TOKEN = re.compile(r"[!-~]{1,1024}")
_SPARE_BYTES = 64 * 2**20
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence in this project's own short words; its text is what holds."""

    version: str
    more: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What it asks of those who use the model."""
        name, page = f"Llama {self.version}", f"llama{self.version.replace('.', '_')}"
        yield f"is Meta's, under the {name} Community License. In short, in our words:"
        yield "- Use it as the Acceptable Use Policy allows."
        yield "- Who passes it on, or a model made from it (an exported guard too), adds a copy of"
        yield "  the licence, shows 'Built with Llama', begins the model's name with 'Llama', and"
        yield f"  keeps this notice: '{name} is licensed under the {name} Community License,"
        yield "  Copyright © Meta Platforms, Inc. All Rights Reserved.'"
        yield "- Whoever has over 700 million monthly users needs a licence of their own from Meta."
        yield "- There is no warranty."
        yield from self.more
        yield f"The licence: https://www.llama.com/{page}/license/"
        yield f"The policy:  https://www.llama.com/{page}/use-policy/"


_VISION = (
    "- Persons living in, and companies based in, the European Union get no rights to models that",
    "  read images, but may use products that contain them.",
)
LICENCES: Mapping[str, Licence] = {
    "meta-llama/Llama-Guard-3-1B": Licence("3.2"),
    "meta-llama/Llama-Guard-3-8B": Licence("3.1"),
    "meta-llama/Llama-Guard-3-11B-Vision": Licence("3.2", _VISION),
}


def main(argv: Sequence[str]) -> int:
    """Run `guard-service pull`; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        pull(arguments)
    except HubError as error:
        print(f"guard-service pull: {error}", file=sys.stderr)
    except OSError as error:
        print(f"guard-service pull: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nguard-service pull: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    else:
        return 0
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="guard-service pull",
        description="Download a model from a hub, verified, into a folder for guard-quantize.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="for example meta-llama/Llama-Guard-3-1B")
    add("--revision", metavar="REV", default="main", help="commit, branch or tag [main]")
    add("--to", metavar="FOLDER", type=Path, help="a folder that does not exist [models/NAME]")
    add(
        "--endpoint",
        metavar="URL",
        default=os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT,
        help=f"the hub [HF_ENDPOINT, or {DEFAULT_ENDPOINT}]",
    )
    add("--token-file", metavar="FILE", type=Path, help="holds an access token [HF_TOKEN]")
    add("--accept-licence", action="store_true", help="you have read and accept the licence")
    return parser


def pull(arguments: argparse.Namespace) -> None:
    """Raises HubError or OSError. The folder then does not exist; what came is kept beside it."""
    repository: str = arguments.repository
    check_repository(repository)
    folder: Path = arguments.to or Path("models") / repository.partition("/")[2]
    if os.path.lexists(folder):
        commit = _already(folder, repository, arguments.revision)
        _say(f"{folder}: already there, verified; commit {commit} (the hub was not asked)")
        return
    hub = Hub(arguments.endpoint, _token(arguments.token_file))
    require_library()
    _agree(hub, repository, arguments.accept_licence)
    listing = hub.listing(repository, arguments.revision)
    total = sum(file.size for file in listing.files)
    _say(f"{repository} at commit {listing.commit}: {len(listing.files)} files, {_size(total)}")
    if listing.skipped:
        _say(f"{listing.skipped} others are left out (pickles, code, Meta's original/)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.part")
    with _locked(draft):
        _room(draft, listing)
        files = {}
        for at, listed in enumerate(listing.files, 1):
            _say(f"[{at}/{len(listing.files)}] {listed.name}, {_size(listed.size)}")
            files[listed.name] = _verified(hub, repository, listing.commit, listed, draft)
        _finish(draft, folder, _record(hub, repository, listing, files))
    _say(f"{folder}: every file is as the hub lists it; {PULLED_FILE} records it")


def _already(folder: Path, repository: str, revision: str) -> str:
    """The commit of a folder that is what would be pulled; a branch may have moved on since.

    Raises HubError for any other folder, which is not written over.
    """
    try:
        record = read_pulled(folder)
        problems = damage(folder, record)
    except (PulledError, OSError):
        problems = ["it was not pulled"]
    else:
        if record.repository != repository:
            problems = [f"it is {record.repository}"]
        elif COMMIT.fullmatch(revision) and record.commit != revision:
            problems = [f"it is commit {record.commit}"]
    if problems:
        raise HubError(
            f"{folder} exists, and is not written over; move it or name another --to "
            f"({problems[0]})"
        )
    return record.commit


def _token(file: Path | None) -> str | None:
    """The token, from the file or from HF_TOKEN. Never shown, not in part, not in errors."""
    where, token = "HF_TOKEN", os.environ.get("HF_TOKEN", "")
    if file is not None:
        with file.open("rb") as opened:
            where, token = str(file), opened.read(4096).decode("ascii", "replace")
    token = token.strip()
    if (token or file is not None) and not _TOKEN.fullmatch(token):
        raise HubError(f"{where}: does not hold a token (one word, nothing else)")
    return token or None


def _agree(hub: Hub, repository: str, accepted: bool) -> None:
    """Show the licence and take a yes, by flag or on a terminal; before anything is asked for."""
    known = LICENCES.get(repository)
    _say(
        f"{repository} "
        + "\n".join(known.lines() if known else ["has a licence that is not known here."])
    )
    _say(f"The model:   {hub.page(repository)} (gated models: accept the terms there, once)")
    if accepted:
        return
    if not sys.stdin.isatty():
        raise HubError("read the licence, then say that you accept it with --accept-licence")
    print("Have you read the licence, and do you accept it? [yes/no] ", end="", file=sys.stderr)
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() != "yes":
        raise HubError("the licence is not accepted; nothing was fetched")


@contextmanager
def _locked(draft: Path) -> Iterator[None]:
    """The folder that files come into, for one process at a time. Removed if it stays empty."""
    if draft.is_symlink():
        raise HubError(f"{draft}: is a link; remove it")
    draft.mkdir(exist_ok=True)
    handle = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{draft}: another pull is at work here") from None
        try:
            yield
        finally:
            if draft.is_dir() and not any(draft.iterdir()):
                draft.rmdir()
    finally:
        os.close(handle)


def _room(draft: Path, listing: Listing) -> None:
    """Raises HubError when files lie there that are not the listing's, or the disk is too small."""
    (draft / PULLED_FILE).unlink(missing_ok=True)  # left by a crash just before the end
    wanted = {listed.name: listed.size for listed in listing.files}
    strange = sorted(path.name for path in draft.iterdir() if path.name not in wanted)
    if strange:
        raise HubError(
            f"{draft} has {ascii(strange[0])[:60]} in it, which is not pulled; remove that folder"
        )
    have = sum(min(path.lstat().st_size, wanted[path.name]) for path in draft.iterdir())
    free, need = shutil.disk_usage(draft).free, sum(wanted.values()) - have
    if free < need + _SPARE_BYTES:
        raise HubError(f"{draft.parent}: {_size(free)} are free, {_size(need)} are needed and some")


def _verified(hub: Hub, repository: str, commit: str, listed: Listed, draft: Path) -> File:
    """Fetch a file, or its rest, and check it. What lay there and turns out wrong (another
    commit's, or broken by a crash) is fetched once more, from its start."""
    path = draft / listed.name
    again = path.exists()
    while True:
        try:
            hub.fetch(repository, commit, listed, path)
            return File(listed.size, listed.check(path))
        except WrongContent:
            path.unlink()
            if not again:
                raise
            again = False


def _record(hub: Hub, repository: str, listing: Listing, files: Mapping[str, File]) -> Pulled:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Pulled(repository, listing.commit, hub.endpoint, now, files)


def _finish(draft: Path, folder: Path, record: Pulled) -> None:
    """Give the draft its name, with its record; never onto something that is there."""
    strange = sorted(entry.name for entry in draft.iterdir() if entry.name not in record.files)
    if strange:
        raise HubError(f"{draft} got {ascii(strange[0])[:60]} while files came; remove that folder")
    record.write(draft)
    if os.path.lexists(folder):
        (draft / PULLED_FILE).unlink()
        raise HubError(f"{folder} appeared meanwhile, and is not written over")
    os.rename(draft, folder)


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count >= _MIB / 10 else f"{count:,} bytes"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
