"""guard-service verify: is a folder still what it was made or pulled as, and does it score so?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from guard_service import artifact
from guard_service.artifact import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    STARTER,
    ArtifactError,
    named_folder,
)
from guard_service.cgroups import ControlGroups
from guard_service.engines import Engine, EngineFailed, open_engine
from guard_service.engines.golden import TOLERANCE, GoldenScores, recorded
from guard_service.pulled import PULLED_FILE, PulledError, damage, read_pulled

if TYPE_CHECKING:
    from guard_service.engines.torch.engine import TorchEngine

_MIB = 2**20
_CONFIG_FILE = "config.json"  # of a checkpoint
_PROG = "guard-service verify"


def main(argv: Sequence[str]) -> int:
    """Run `guard-service verify`; returns the exit code: 0 only when nothing is wrong."""
    asked = _parser().parse_args(argv)
    try:
        for line in _verified(named_folder(asked.folder), asked):
            print(line, flush=True)
    except (ArtifactError, EngineFailed, PulledError, OSError) as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Check a model folder: every digest that is known, and that golden "
        "conversations score as recorded. What cannot be checked is said; the exit code is 0 "
        "unless something is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help=f"an artifact ({MANIFEST_FILE}), {STARTER}, a pulled folder or another checkpoint",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help=f"of a checkpoint that you trust, here: score the golden conversations and write "
        f"{GOLDEN_FILE}; from then on the folder is served only where it scores so",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="with --record: by which a score may differ elsewhere (int8 twice, int4 four times "
        f"that), 0 to 0.2 [{TOLERANCE}]",
    )
    for flag, choices in (
        ("--device", ("auto", "cpu", "cuda")),
        ("--dtype", ("auto", "bfloat16", "float32")),
        ("--weights", ("stored", "int8", "int4")),
    ):
        parser.add_argument(
            flag, choices=choices, default=choices[0], help=f"of a checkpoint [{choices[0]}]"
        )
    return parser


def _verified(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    if (folder / MANIFEST_FILE).is_file():
        if asked.record:
            raise ArtifactError(f"{folder}: an artifact's golden scores are in {MANIFEST_FILE}")
        yield from _artifact(folder)
        return
    pulled = (folder / PULLED_FILE).is_file()
    if not pulled and not (folder / _CONFIG_FILE).is_file():
        raise PulledError(
            f"{folder}: no model here; it has neither {MANIFEST_FILE} nor {PULLED_FILE} nor "
            f"{_CONFIG_FILE}"
        )
    if pulled:
        yield from _pulled(folder)
    if pulled and not asked.record and not (folder / GOLDEN_FILE).exists():
        yield "  scores  none recorded; --record does so, on a machine that you trust"
        return
    yield from _scores(folder, asked, pulled)


def _artifact(folder: Path) -> Iterator[str]:
    """The digests, then the golden prompts, as the service does before it is ready."""
    manifest = artifact.load(folder).manifest
    engine = open_engine(folder, threads=ControlGroups().cores())
    try:
        engine.self_test()
    finally:
        engine.close()
    size = sum(file.size for file in manifest.files.values()) / _MIB
    yield f"{folder}: {manifest.name}, {manifest.digest}"
    yield f"  files   {len(manifest.files)}, {size:,.1f} MiB, sha256 as in {MANIFEST_FILE}"
    yield (
        f"  golden  {len(manifest.golden)} prompts score as recorded, within {manifest.tolerance:g}"
    )


def _pulled(folder: Path) -> Iterator[str]:
    pulled = read_pulled(folder)
    if problems := damage(folder, pulled):
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PulledError(f"{folder} is not what was pulled; move it away, pull anew:\n{listed}")
    size = sum(file.size for file in pulled.files.values()) / _MIB
    yield f"{folder}: {pulled.repository} at commit {pulled.commit}, pulled {pulled.date}"
    yield f"  files   {len(pulled.files)}, {size:,.1f} MiB, sha256 as in {PULLED_FILE}"


def _scores(folder: Path, asked: argparse.Namespace, pulled: bool) -> Iterator[str]:
    """What the model itself scores here; `pulled` says whether its digests have been checked."""
    if find_spec("torch") is None and pulled and not asked.record:
        yield "  golden  not scored: torch is not installed (llama-guard-service[vision])"
        return
    if asked.record and (folder / GOLDEN_FILE).exists():
        raise ArtifactError(f"{folder / GOLDEN_FILE} is there; to record anew, remove it first")
    if not 0 <= asked.tolerance <= 0.2:
        raise ArtifactError(f"--tolerance {asked.tolerance} is not between 0 and 0.2")
    engine = open_engine(
        folder,
        threads=ControlGroups().cores(),
        device=asked.device,
        dtype=asked.dtype,
        weights=asked.weights,
    )
    assert _is_torch(engine)
    try:
        if not pulled:
            yield f"{folder}: {engine.card.name}, {engine.card.digest}"
        if not pulled and engine.golden is None:
            yield (
                f"  files   have not been checked: neither {PULLED_FILE} nor {GOLDEN_FILE} says "
                "what they must be"
            )
        engine.self_test()
        if engine.golden is not None:
            yield from _as_recorded(engine.golden, engine.card.plan, pulled)
            return
        yield f"  scores  are numbers, and the same each time ({engine.card.plan})"
        if asked.record:
            yield _record(folder, engine, asked)
    finally:
        engine.close()


def _is_torch(engine: Engine) -> TypeGuard[TorchEngine]:
    return engine.card.engine == "torch"


def _as_recorded(golden: GoldenScores, plan: str, pulled: bool) -> Iterator[str]:
    if not pulled:
        yield f"  files   sha256 as when {GOLDEN_FILE} was recorded; their source is not known"
    yield (
        f"  golden  {len(golden.golden)} conversations score as recorded, within "
        f"{golden.allowed(plan):g} ({plan}; recorded with {golden.made_with})"
    )


def _record(folder: Path, engine: TorchEngine, asked: argparse.Namespace) -> str:
    """Write what the model scores here into the folder."""
    card = engine.card
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    golden = recorded(engine.score, card.judges_images)
    GoldenScores(card.digest, f"{card.plan}, {versions}", asked.tolerance, golden).write(folder)
    return (
        f"  golden  {len(golden)} conversations recorded in {GOLDEN_FILE}; they must score so "
        f"within {asked.tolerance:g} wherever this folder is served"
    )
