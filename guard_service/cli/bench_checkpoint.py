"""The figures of `guardctl bench engine` for a checkpoint in torch, with images where it sees them.

Every case is judged by our engine with what it has kept, by one that keeps nothing, and by
transformers' `generate`, all on the same weights in memory and by turns. What was to be multiplied
and moved is known (`engines.torch.costs`); the device's own rates are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from guard_service.cli.bench_device import Rates, rates
from guard_service.cli.checkpoint_cases import Case, Cases
from guard_service.cli.peers.worker import memory
from guard_service.engines import Assessed
from guard_service.engines.torch.costs import Costs, Work
from guard_service.engines.torch.engine import Checkpoint, TorchEngine
from guard_service.engines.torch.plain import Plain
from guard_service.prompt import Prompt

VERDICTS = {"safe": 1, "unsafe": 4}  # tokens to write: "safe"; "unsafe", newline, "S", a number
BATCHES = (1, 4, 16)
_SPOKEN = 3  # tokens that our engine appends to a prompt
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What to measure, and where."""

    model: str
    threads: int
    repeats: int = 5
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "stored"


@dataclass(slots=True)
class _Found:
    """The times of one case, and what our engine did in the last turn."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, Assessed] = field(default_factory=dict)
    prompt_tokens: int = 0
    work: Work = field(default_factory=Work)

    def add(self, who: str, seconds: float) -> None:
        self.seconds.setdefault(who, []).append(seconds)


class Subject:
    """The contenders on one checkpoint."""

    def __init__(self, setting: Setting) -> None:
        start = time.perf_counter()
        self.checkpoint = Checkpoint.load(
            Path(setting.model), setting.threads, setting.device, setting.dtype, setting.weights
        )
        self.kept = self.checkpoint.engine()
        self.load_s = time.perf_counter() - start
        self.kept.self_test()
        self.ready_s = time.perf_counter() - start
        self.bare = self.checkpoint.engine(False, 0, 0)
        self.plain = Plain(self.checkpoint)
        geometry = self.checkpoint.geometry
        self.costs = Costs(geometry)
        vision = geometry.vision or {"image_size": 0, "max_num_tiles": 0}
        self.cases = Cases(self.kept, vision["image_size"], vision["max_num_tiles"])

    @property
    def device(self) -> torch.device:
        """Where the model's first layer is."""
        found: torch.device = self.checkpoint.model.device
        return found

    def turn(self, case: Case, found: _Found) -> None:
        """Let each judge the case once."""
        seconds, ours = self._kept(case)
        found.add("kept", seconds)
        seconds, bare = _timed(self.bare, case.prompt)
        found.add("bare", seconds)
        found.tokens = {"kept": ours, "bare": bare}
        prompt = case.prompt
        found.prompt_tokens = len(prompt.prefix) + len(prompt.body) + len(prompt.closing)
        found.work = self._work(case, ours)
        for verdict, tokens in VERDICTS.items():
            start = time.perf_counter()
            self.plain.written(prompt, tokens)
            found.add(f"generate {verdict}", time.perf_counter() - start)

    def _kept(self, case: Case) -> tuple[float, Assessed]:
        if not case.grows:
            for prompt in case.before:
                self.kept.assess([prompt])
            return _timed(self.kept, case.prompt)
        session = self.kept.session()
        session.assess(case.before)
        start = time.perf_counter()
        (ours,) = session.assess([case.prompt])
        seconds = time.perf_counter() - start
        session.close()
        return seconds, ours

    def _work(self, case: Case, ours: Assessed) -> Work:
        """What our engine multiplied and moved for the case's prompt."""
        image = case.prompt.image
        if image is None:
            return self.costs.text(ours.computed_tokens, ours.cached_tokens)
        seen = any(one.image == image for one in case.before)
        assert image.picture is not None
        tiles = self.tiles(case.prompt) if seen else self.checkpoint.geometry.vision_tiles
        row = self.costs.text(ours.computed_tokens, ours.cached_tokens, tiles)
        return row if seen else row + self.costs.image()

    def tiles(self, prompt: Prompt) -> int:
        """That the prompt's image fills."""
        return int(self.plain.inputs(prompt)["aspect_ratio_mask"].sum())


def figures(setting: Setting, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Measure, ready for JSON; `tell` hears what is being done.

    Raises ArtifactError, EngineFailed, RuntimeError.
    """
    tell("loading the checkpoint")
    subject = Subject(setting)
    loaded = memory()
    speed = rates(subject.device, subject.checkpoint.model.dtype)
    cases = list(subject.cases.named())
    found = {name: _Found() for name, _ in cases}
    for turn in range(setting.repeats + 1):
        tell(f"round {turn} of {setting.repeats}" if turn else "warming up")
        for name, make in cases:
            subject.turn(make(), found[name] if turn else _Found())
    tell("batches")
    batches = _batches(subject, setting.repeats)
    card = subject.checkpoint.card
    return {
        "model": {
            "name": card.name,
            "digest": card.digest,
            "parameters": card.parameters,
            "held": card.plan,
            "template": card.template,
            "notice": card.notice,
        },
        "device": _device(subject.device),
        "threads": setting.threads,
        "repeats": setting.repeats,
        "load_s": subject.load_s,
        "ready_s": subject.ready_s,
        "rates": {"tflops": speed.flops / 1e12, "gb_per_s": speed.bytes / 1e9},
        "cases": [_told(name, one, speed, subject) for name, one in found.items()],
        "batches": batches,
        "memory": _memory(subject, loaded),
    }


def _timed(engine: TorchEngine, prompt: Prompt) -> tuple[float, Assessed]:
    start = time.perf_counter()
    (ours,) = engine.assess([prompt])
    return time.perf_counter() - start, ours


def _batches(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Verdicts per second: of text, of one image asked about again and again, of new images."""
    kinds = {"text": 0}
    if subject.checkpoint.card.judges_images:
        kinds |= {"one new image": 1, "each a new image": max(BATCHES)}
    found = []
    for kind, pictures in kinds.items():
        for size in BATCHES:
            seconds = []
            for _ in range(repeats):
                prompts = subject.cases.batch(size, min(pictures, size))
                start = time.perf_counter()
                subject.kept.assess(prompts)
                seconds.append(time.perf_counter() - start)
            rate = size / median(seconds)
            found.append({"prompts": kind, "size": size, "verdicts_per_s": rate})
    return found


def _told(name: str, found: _Found, speed: Rates, subject: Subject) -> dict[str, Any]:
    """Medians, ratios of one turn's times, tokens, and which share of the device was reached."""
    ours = found.seconds["kept"]
    kept, bare = found.tokens["kept"], found.tokens["bare"]
    moved = found.work.weights * _weight_bytes(subject) + found.work.state * _state_bytes(subject)
    took_s = median(ours)
    return {
        "case": name,
        "prompt_tokens": found.prompt_tokens + _SPOKEN,
        "computed_tokens": kept.computed_tokens,
        "kept_tokens": kept.cached_tokens,
        "computed_without_caches": bare.computed_tokens,
        "times": {
            who: {
                "median_ms": 1000 * median(seconds),
                "spread": (max(seconds) - min(seconds)) / 2 / median(seconds),
                "times_ours": median(a / b for a, b in zip(seconds, ours, strict=True)),
                "all_ms": [1000 * one for one in seconds],
            }
            for who, seconds in found.seconds.items()
        },
        "gflop": found.work.flops / 1e9,
        "mb_moved": moved / 1e6,
        "share_of_matrix_rate": found.work.flops / took_s / speed.flops,
        "share_of_bandwidth": moved / took_s / speed.bytes,
    }


def _weight_bytes(subject: Subject) -> float:
    """Of a parameter, on average."""
    stored = {"int8": 1.0, "int4": 0.5}
    return stored.get(subject.checkpoint.card.plan, _state_bytes(subject))


def _state_bytes(subject: Subject) -> float:
    dtype: torch.dtype = subject.checkpoint.model.dtype
    return float(dtype.itemsize)


def _memory(subject: Subject, loaded: dict[str, float]) -> dict[str, Any]:
    now = memory()
    found: dict[str, Any] = {
        "loaded_mib": loaded["rss_mib"],
        "rss_mib": now["rss_mib"],
        "peak_mib": now["peak_mib"],
        "image_cache_mib": subject.kept.image_bytes / 2**20,
    }
    if subject.device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(subject.device)
        found["cuda_peak_mib"] = torch.cuda.max_memory_allocated(subject.device) / 2**20
        found["cuda_reserved_mib"] = reserved / 2**20
    return found


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return "cpu"
