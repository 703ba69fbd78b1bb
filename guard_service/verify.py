"""guard-service verify: is a folder still what it was made or pulled as?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from guard_service import artifact
from guard_service.artifact import MANIFEST_FILE, STARTER, ArtifactError, named_folder
from guard_service.engines import EngineFailed, open_engine
from guard_service.pulled import PULLED_FILE, PulledError, damage, read_pulled

_MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Run `guard-service verify`; returns the exit code: 0 only when everything holds."""
    parser = argparse.ArgumentParser(
        prog="guard-service verify",
        description="Check a model folder: every digest, and the scores of a guard's golden "
        "prompts.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help=f"has {MANIFEST_FILE} or {PULLED_FILE} in it; or {STARTER}"
    )
    named = parser.parse_args(argv).folder
    try:
        lines = _verified(named_folder(named))
    except (ArtifactError, EngineFailed, PulledError, OSError) as error:
        print(f"guard-service verify: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def _verified(folder: Path) -> list[str]:
    if (folder / MANIFEST_FILE).is_file():
        return _artifact(folder)
    if (folder / PULLED_FILE).is_file():
        return _pulled(folder)
    raise PulledError(f"{folder}: has neither {MANIFEST_FILE} nor {PULLED_FILE} in it")


def _artifact(folder: Path) -> list[str]:
    """The digests, then the golden prompts, as the service does before it is ready."""
    manifest = artifact.load(folder).manifest
    engine = open_engine(folder, threads=len(os.sched_getaffinity(0)))
    try:
        engine.self_test()
    finally:
        engine.close()
    size = sum(file.size for file in manifest.files.values()) / _MIB
    return [
        f"{folder}: {manifest.name}, {manifest.digest}",
        f"  files   {len(manifest.files)}, {size:,.1f} MiB, sha256 as in {MANIFEST_FILE}",
        f"  golden  {len(manifest.golden)} prompts score as recorded, "
        f"within {manifest.tolerance:g}",
    ]


def _pulled(folder: Path) -> list[str]:
    pulled = read_pulled(folder)
    if problems := damage(folder, pulled):
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PulledError(f"{folder} is not what was pulled; move it away, pull anew:\n{listed}")
    size = sum(file.size for file in pulled.files.values()) / _MIB
    return [
        f"{folder}: {pulled.repository} at commit {pulled.commit}, pulled {pulled.date}",
        f"  files   {len(pulled.files)}, {size:,.1f} MiB, sha256 as in {PULLED_FILE}",
    ]
