"""What `guardctl expect` works out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guard_service.artifact import ArtifactError
from guard_service.cli import exits
from guard_service.engines import IMAGE_CACHE_BYTES
from guard_service.engines.torch.costs import Costs, Work
from guard_service.engines.torch.geometry import Geometry, read_geometry
from guard_service.engines.torch.published import PUBLISHED

# Tokens of the published templates with their 13 categories: before a conversation and behind it,
# and what our engine appends to read the verdict.
PREFIX, CLOSING, SPOKEN = 136, 56, 3
UNSAFE = 4  # tokens that generate writes: "unsafe", newline, "S", a number
BATCH = 16
_BYTES = {"bfloat16": 2.0, "float32": 4.0, "int8": 1.0, "int4": 0.5}
_STATE_BYTES = {"float32": 4}


@dataclass(frozen=True, slots=True)
class Device:
    """A device by its data sheet, and which shares of that are reached."""

    name: str
    tflops: float
    gb_per_s: float
    gib: float
    matrix_share: float
    bandwidth_share: float


def run(model: str, device: Device, held: str, tokens: int, as_json: bool) -> int:
    """Work out and print."""
    if held not in _BYTES:
        exits.fail(f"--weights must be one of {', '.join(_BYTES)}", exits.USAGE)
    try:
        geometry = _geometry(model)
    except (ArtifactError, OSError) as wrong:
        exits.fail(f"{model}: {wrong}", exits.USAGE)
    found = expected(geometry, device, held, tokens)
    print(json.dumps(found) if as_json else "\n".join(_lines(model, found)))
    return exits.OK


def expected(geometry: Geometry, device: Device, held: str, tokens: int) -> dict[str, Any]:
    """Everything, ready for JSON. Of an image all tiles are used."""
    costs, state = Costs(geometry), _STATE_BYTES.get(held, 2)
    # What libraries round are the matrices; embedding and output layer stay as they are.
    rows = costs.vocab * costs.hidden
    matrices = costs.parameters - 2 * rows
    weights = matrices * _BYTES[held] + 2 * rows * max(_BYTES[held], state)
    tiles = geometry.vision_tiles

    def told(runs: Sequence[Work], verdicts: int) -> dict[str, float]:
        flops = sum(one.flops for one in runs)
        moved = [one.weights * _BYTES[held] + one.state * state for one in runs]
        seconds = sum(
            max(
                one.flops / (device.tflops * 1e12 * device.matrix_share),
                read / (device.gb_per_s * 1e9 * device.bandwidth_share),
            )
            for one, read in zip(runs, moved, strict=True)
        )
        return {
            "gflop": flops / 1e9,
            "mb_moved": sum(moved) / 1e6,
            "ms": 1000 * seconds,
            "verdicts_per_s": verdicts / seconds,
        }

    works = dict(_works(costs, tokens, tiles))
    return {
        "device": asdict(device),
        "held": held,
        "conversation_tokens": tokens,
        "parameters": costs.parameters,
        "weights_gib": weights / 2**30,
        "fits": weights + IMAGE_CACHE_BYTES * bool(tiles) < 0.9 * device.gib * 2**30,
        "kib_per_token_kept": costs.state_per_token * state / 2**10,
        "mib_per_image_kept": costs.sight(tiles) * state / 2**20,
        "tiles": tiles,
        "cases": {
            name: told(runs, BATCH if name.startswith("batch") else 1)
            for name, runs in works.items()
        },
    }


def _works(costs: Costs, tokens: int, tiles: int) -> Iterator[tuple[str, tuple[Work, ...]]]:
    """What is run for a verdict, one run after the other."""
    row, whole = tokens + CLOSING + SPOKEN, PREFIX + tokens + CLOSING + SPOKEN
    head = Work(costs.vocab * costs.hidden, costs.vocab * costs.hidden)

    def generated(tiles: int) -> tuple[Work, ...]:
        more = (costs.written(whole - SPOKEN + at, tiles) for at in range(1, UNSAFE))
        return (costs.text(whole - SPOKEN, 0, tiles) + head, *more)

    first, *more = generated(0)
    yield "text, policy known", (costs.text(row, PREFIX),)
    yield "text, policy new", (costs.text(whole),)
    yield "text by generate, safe", (first,)
    yield "text by generate, unsafe", (first, *more)
    yield f"batch of {BATCH} texts, policy known", (_times(costs.text(row, PREFIX), BATCH),)
    if not tiles:
        return
    look, seen = costs.image(), costs.text(whole, 0, tiles)
    again = costs.text(row, PREFIX, tiles)
    first, *more = generated(tiles)
    yield "looking at an image", (look,)
    yield "image, never seen", (look, seen)
    yield "image seen again, another policy", (seen,)
    yield "image seen again, same policy", (again,)
    yield "image by generate, safe", (look, first)
    yield "image by generate, unsafe", (look, first, *more)
    yield f"batch of {BATCH} about one known image", (_times(again, BATCH),)


def _times(work: Work, count: int) -> Work:
    """Several rows at once: the weights are read once."""
    return Work(work.multiply_adds * count, work.weights, work.state * count)


def _geometry(model: str) -> Geometry:
    if model in PUBLISHED:
        return read_geometry(json.dumps(PUBLISHED[model]).encode())
    path = Path(model)
    return read_geometry((path / "config.json" if path.is_dir() else path).read_bytes())


def _lines(model: str, found: dict[str, Any]) -> Iterator[str]:
    device = found["device"]
    yield (
        f"{model}  {found['parameters'] / 1e6:,.1f} M parameters as {found['held']}: "
        f"{found['weights_gib']:.2f} GiB; a token kept {found['kib_per_token_kept']:.0f} KiB"
        + (
            f", an image of {found['tiles']} tiles {found['mib_per_image_kept']:.0f} MiB"
            if found["tiles"]
            else ""
        )
    )
    yield (
        f"{device['name']}: {device['tflops']:g} TFLOP/s, {device['gb_per_s']:g} GB/s, "
        f"{device['gib']:.1f} GiB; {device['matrix_share']:.0%} and "
        f"{device['bandwidth_share']:.0%} of them reached"
        + ("" if found["fits"] else "; THE MODEL DOES NOT FIT")
    )
    yield f"a conversation of {found['conversation_tokens']} tokens"
    yield f"{'':36}{'GFLOP':>12}{'MB moved':>12}{'ms':>10}{'verdicts/s':>13}"
    for name, one in found["cases"].items():
        yield (
            f"{name:36}{one['gflop']:>12,.1f}{one['mb_moved']:>12,.1f}{one['ms']:>10,.2f}"
            f"{one['verdicts_per_s']:>13,.1f}"
        )
