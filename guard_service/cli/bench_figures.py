"""The figures of `guardctl bench engine`: our engine and its peers on the same conversations.

Contenders take turns at every conversation, so that whatever else the machine does meets all of
them; a ratio is the median of the ratios of one turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from guard_service.artifact import Artifact, load_named
from guard_service.cgroups import ControlGroups
from guard_service.cli.bench_contender import Contender
from guard_service.cli.bench_machine import INT8, Machine, multiply_adds_per_token
from guard_service.cli.bench_questions import Questions
from guard_service.cli.peers import BOTH, KINDS

LENGTHS = (10, 40, 160, 640)
VERDICTS = {"safe": 1, "unsafe": 4}  # tokens to write: "safe"; "unsafe", newline, "S", a number
REPLY_TOKENS, CHECK_EVERY = 1000, 32
_OURS = "ours"
Tell = Callable[[str], None]
Times = dict[tuple[str, int, str], list[dict[str, Any]]]  # by prefix, length and verdict


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `peers` are KIND=PATH; `template` replaces the artifact's own."""

    model: str
    peers: tuple[str, ...] = ()
    template: str = ""
    threads: int = 0
    repeats: int = 5
    cold_starts: int = 3  # of ours; the first may differ from the others

    @property
    def engine_threads(self) -> int:
        """One for each core of this process, unless told otherwise."""
        return self.threads or ControlGroups().cores()


def contenders(plan: Plan) -> list[Contender]:
    """Ours first, then the peers in order. Raises ValueError for a peer of no known kind."""
    found = [Contender(_OURS, _OURS, plan.model, plan.engine_threads)]
    for peer in plan.peers:
        kind, equals, path = peer.partition("=")
        if not equals or kind not in KINDS:
            raise ValueError(f"--peer {peer}: must be KIND=PATH with one of {', '.join(KINDS)}")
        both = (f"{kind}-fp32", f"{kind}-bf16") if kind in BOTH else (kind,)
        found += [
            Contender(f"{one} {Path(path).name}", one, path, plan.engine_threads) for one in both
        ]
    return found


def figures(plan: Plan, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Measure, ready for JSON; `tell` hears what is being done.

    A peer that cannot take part, or ends, is reported as such and ends nothing. Raises ValueError,
    ArtifactError; RuntimeError when our own engine fails.
    """
    artifact = load_named(plan.model)
    questions = Questions(artifact, plan.template)
    lengths = tuple(tokens for tokens in LENGTHS if tokens <= questions.window)
    everyone = contenders(plan)
    machine = Machine(plan.engine_threads)
    times: dict[str, Times] = {one.name: defaultdict(list) for one in everyone}
    with _running(everyone, plan.cold_starts, questions, tell) as starts:
        memory = {}
        for prefix in ("warm", "cold"):
            for turn in range(1, plan.repeats + 1):
                tell(f"{prefix} prefix, round {turn} of {plan.repeats}")
                machine.run()
                _round(everyone, questions, lengths, prefix, times)
            memory[prefix] = {one.name: one.ask({"do": "memory"}) for one in everyone}
        tell("a growing reply")
        stream = _stream(everyone[0], questions)
        memory["end"] = {one.name: one.ask({"do": "memory"}) for one in everyone}
    if everyone[0].failure:
        raise RuntimeError(everyone[0].failure)
    told = [_told(one, starts, memory, times[one.name], times[_OURS]) for one in everyone]
    return {
        "model": _described(artifact, questions),
        "threads": plan.engine_threads,
        "repeats": plan.repeats,
        "left_out": [tokens for tokens in LENGTHS if tokens not in lengths],
        "contenders": told,
        "stream": stream,
        "machine": _machine(machine, artifact, told[0]["prefill_tokens_per_s"]),
    }


@contextmanager
def _running(
    everyone: Sequence[Contender], cold_starts: int, questions: Questions, tell: Tell
) -> Iterator[dict[str, list[dict[str, float]]]]:
    """Everyone's process, ready and with the prefix known; yields the cold starts of each."""
    starts: dict[str, list[dict[str, float]]] = {}
    first = min(LENGTHS)
    try:
        for one in everyone:
            starts[one.name] = []
            for _ in range(cold_starts if one.kind == _OURS else 1):
                tell(f"starting {one.name}")
                one.close()
                one.open(questions.of(first))
                if one.start:
                    starts[one.name].append(one.start)
            if one.kind == _OURS and one.failure:
                raise RuntimeError(one.failure)
            one.verdict(questions.of(first), max(VERDICTS.values()))
        yield starts
    finally:
        for one in everyone:
            one.close()


def _round(
    everyone: Sequence[Contender],
    questions: Questions,
    lengths: Sequence[int],
    prefix: str,
    times: dict[str, Times],
) -> None:
    """Every length and verdict once, everyone asked the same."""
    for tokens in lengths:
        for verdict, decode in VERDICTS.items():
            question = questions.of(tokens, new_prefix=prefix == "cold")
            for one in everyone:
                if answer := one.verdict(question, decode):
                    times[one.name][prefix, tokens, verdict].append(answer)


def _stream(ours: Contender, questions: Questions) -> dict[str, Any] | None:
    """A growing reply: what its checks computed, beside what they may, and beside scanning anew."""
    grown, reply = questions.growing(REPLY_TOKENS, CHECK_EVERY)
    found = ours.ask({"do": "stream", "questions": [one.document() for one in grown]})
    if found is None:
        return None
    closing = len(grown) * questions.closing_tokens
    return {
        "reply_tokens": reply,
        "checks": len(grown),
        "closing_tokens": closing,
        "tokens_of_reply_and_closings": found["tokens"] / (reply + closing),
        "share_of_allowed": found["tokens"] / (1.3 * reply + closing),
        **found,
        "rescan_times": found["rescan_seconds"] / found["seconds"],
    }


def _described(artifact: Artifact, questions: Questions) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "name": manifest.name,
        "digest": artifact.digest,
        "parameters": manifest.parameters,
        "scheme": manifest.quantization.scheme,
        "template": questions.template,
        "window_tokens": questions.window,
        "prefix_tokens": questions.prefix_tokens,
        "closing_tokens": questions.closing_tokens,
    }


def _told(
    one: Contender,
    starts: dict[str, list[dict[str, float]]],
    memory: dict[str, dict[str, dict[str, float] | None]],
    times: Times,
    ours: Times,
) -> dict[str, Any]:
    """All about one contender; `ours` are the times that ratios are against."""
    warm, end = memory["warm"][one.name], memory["end"][one.name]
    cold = {tokens: answers for (prefix, tokens, verdict), answers in times.items()
            if (prefix, verdict) == ("cold", "safe")}  # fmt: skip
    longest = cold[max(cold)] if cold else []
    return {
        "name": one.name,
        "kind": one.kind,
        "failure": one.failure or None,
        "cold_starts": starts.get(one.name, []),
        "rss_mib": warm and round(warm["rss_mib"], 1),
        "peak_mib": end and round(end["peak_mib"], 1),
        "prefill_tokens_per_s": median(one["tokens"] / one["seconds"] for one in longest)
        if longest
        else None,
        "verdicts": [
            {
                **dict(zip(("prefix", "tokens", "verdict"), case, strict=True)),
                **_summary(answers, ours[case]),
            }
            for case, answers in times.items()
        ],
    }


def _summary(answers: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, spread (half of the range, as a share of the median), ratio to ours."""
    seconds = [answer["seconds"] for answer in answers]
    middle = median(seconds)
    pairs = zip(answers, ours, strict=False)  # one that has failed has fewer
    return {
        "times_ours": median(a["seconds"] / b["seconds"] for a, b in pairs),
        "median_ms": 1000 * middle,
        "spread": (max(seconds) - min(seconds)) / 2 / middle,
        "computed_tokens": answers[-1]["tokens"],
        "all_ms": [1000 * one for one in seconds],
    }


def _machine(machine: Machine, artifact: Artifact, tokens_per_s: float | None) -> dict[str, Any]:
    """Multiply-adds per second, in billions, and which share of the best int8 prefill reaches."""
    rates = machine.rates()
    per_token = multiply_adds_per_token(artifact.manifest.geometry)
    reached = per_token * (tokens_per_s or 0.0)
    return {
        "giga_multiply_adds_per_s": {name: rate / 1e9 for name, rate in rates.items()},
        "mega_multiply_adds_per_token": per_token / 1e6,
        "prefill_giga_multiply_adds_per_s": reached / 1e9,
        "prefill_share_of_int8": reached / max(rates[name] for name in INT8),
    }
