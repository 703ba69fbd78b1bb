"""What `guardctl replay` does: lines of an audit log, asked again of a guard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc

from guard_api.v1 import guard_pb2, guard_pb2_grpc, verdict_pb2
from guard_middleware.bearer import TokenFile
from guard_middleware.channel import open_channel
from guard_service.audit.host import surroundings
from guard_service.audit.keys import AuditError, read_keys
from guard_service.audit.payload import read_private, unseal
from guard_service.audit.verifying import Tampered, entries, segments_of
from guard_service.cli.compared import differences
from guard_service.cli.exits import NO_VERDICT, OK, USAGE, fail, printable
from guard_service.cli.place import Place, guard_here
from guard_service.config import MIB

MESSAGE_BYTES = 64 * MIB  # images that a recorded request had


@dataclass(frozen=True, slots=True)
class Line:
    """A recorded verdict and what it is of. `host` is where it was made."""

    entry: dict[str, Any]
    request: guard_pb2.ClassifyRequest
    host: dict[str, str]

    @property
    def plan(self) -> str:
        """Of kernels; empty for engines that have none."""
        return str(self.entry["engine"]["plan"])


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is to be replayed: all verdicts that have a payload, or those named."""

    paths: tuple[Path, ...]
    audit_key: Path
    payload_key: Path
    verdicts: frozenset[str] = frozenset()

    def wanted(self, entry: dict[str, Any]) -> bool:
        """Whether a line is to be compared."""
        if entry["kind"] != "verdict" or "payload" not in entry:
            return False
        return not self.verdicts or entry["verdict_id"] in self.verdicts

    def lines(self) -> list[Line]:
        """Those lines, and those before them in their streams. Raises AuditError, Tampered,
        ValueError, OSError."""
        segments, keys = segments_of(self.paths), read_keys(self.audit_key)
        private = read_private(self.payload_key)
        found = [entry for entry in entries(segments, keys) if self.wanted(entry)]
        if missing := self.verdicts - {entry["verdict_id"] for entry in found}:
            raise ValueError(f"no verdict with a payload has the id {', '.join(sorted(missing))}")
        streams = {entry["stream"] for entry in found if entry.get("stream")}
        lines, host = [], {}
        for entry in entries(segments, keys):
            if entry["kind"] == "segment":
                host = entry["host"]
            elif self.wanted(entry) or "payload" in entry and entry.get("stream") in streams:
                if entry["kind"] != "verdict":
                    continue
                data = unseal(entry["payload"], private, entry["verdict_id"])
                lines.append(Line(entry, guard_pb2.ClassifyRequest.FromString(data), host))
        return lines


def run(recorded: Recorded, place: Place, timeout_s: float) -> int:
    """Replay and tell; the exit code."""
    try:
        lines = recorded.lines()
    except (AuditError, Tampered, ValueError, OSError) as error:
        fail(str(error), USAGE)
    if not lines:
        fail("the log has no verdict with a payload; audit_payload_key records them", USAGE)
    same = different = 0
    for plan, group in groupby(sorted(lines, key=lambda one: one.plan), key=lambda one: one.plan):
        with ExitStack() as stack:
            asks = Asks(_guard(stack, place, plan), timeout_s, place.token)
            for line, said in _answers(asks, list(group)):
                if not recorded.wanted(line.entry):
                    continue
                wrong = [said] if isinstance(said, str) else differences(line.entry, said)
                same, different = same + (not wrong), different + bool(wrong)
                _tell(line, wrong, here=not place.address)
    print(f"{same} the same, bit for bit; {different} different")
    return NO_VERDICT if different else OK


def _guard(stack: ExitStack, place: Place, plan: str) -> Any:
    """A stub of the guard to ask; one of our own has the plan of the lines."""
    if place.address:
        target, tls = stack.enter_context(place.open())
    else:
        here = guard_here(
            place.model or "starter",
            place.policies,
            kernel_plan=plan or "auto",
            max_message_bytes=MESSAGE_BYTES,
        )
        target, tls = stack.enter_context(here), None
    channel = stack.enter_context(open_channel(target, tls))
    return guard_pb2_grpc.GuardServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Asks:
    """How a guard is asked."""

    stub: Any
    timeout_s: float
    token: TokenFile | None

    def judged(self, request: guard_pb2.ClassifyRequest) -> verdict_pb2.Verdict:
        """Raises RpcError."""
        reply: guard_pb2.ClassifyResponse = self.stub.Classify(
            request, timeout=self.timeout_s, metadata=self._metadata
        )
        return reply.verdict

    def growing(self, steps: Sequence[guard_pb2.ClassifyStreamRequest]) -> Any:
        """The call, whose answers raise RpcError."""
        timeout_s = self.timeout_s * len(steps)
        return self.stub.ClassifyStream(iter(steps), timeout=timeout_s, metadata=self._metadata)

    @property
    def _metadata(self) -> Any:
        return self.token.metadata() if self.token else ()


def _answers(asks: Asks, lines: Sequence[Line]) -> Iterator[tuple[Line, verdict_pb2.Verdict | str]]:
    """Each line and what is said today: a verdict, or why there is none."""
    streams: dict[str, list[Line]] = {}
    for line in lines:
        if stream := line.entry.get("stream"):
            streams.setdefault(stream, []).append(line)
            continue
        line.request.no_cache = True
        try:
            yield line, asks.judged(line.request)
        except grpc.RpcError as error:
            yield line, _unable(error)
    for steps in streams.values():
        yield from _streamed(asks, sorted(steps, key=lambda one: one.entry["step"]))


def _streamed(
    asks: Asks, lines: Sequence[Line]
) -> Iterator[tuple[Line, verdict_pb2.Verdict | str]]:
    """The verdicts of a stream, asked for at the very places where they were: what an engine holds
    of a growing reply is then what it was."""
    steps = _steps(lines)
    why = "no verdict: the stream ended before it"
    answered = 0
    if steps is None:
        why = "the lines before it in its stream are not there"
    else:
        call = asks.growing(steps)
        try:
            for line, said in zip(lines, call, strict=False):
                answered += 1
                yield line, said.verdict
        except grpc.RpcError as error:
            why = _unable(error)
        finally:
            call.cancel()
    for line in lines[answered:]:
        yield line, why


def _steps(lines: Sequence[Line]) -> list[guard_pb2.ClassifyStreamRequest] | None:
    """What makes the stream grow as it did; None where lines of it are missing."""
    steps = [_start(lines[0].request)]
    reply = ""
    for number, line in enumerate(lines, 1):
        text = line.request.conversation.messages[-1].parts[0].text
        if line.entry["step"] != number or not text.startswith(reply):
            return None
        piece = guard_pb2.StreamPiece(text=text.removeprefix(reply), check=True)
        steps.append(guard_pb2.ClassifyStreamRequest(piece=piece))
        reply = text
    return steps


def _start(request: guard_pb2.ClassifyRequest) -> guard_pb2.ClassifyStreamRequest:
    start = guard_pb2.StreamStart(policy=request.policy, language=request.language)
    start.conversation.messages.extend(request.conversation.messages[:-1])
    return guard_pb2.ClassifyStreamRequest(start=start)


def _unable(error: Any) -> str:
    return f"no verdict: {error.code().name}: {error.details()}"


def _tell(line: Line, wrong: Sequence[str], here: bool) -> None:
    entry = line.entry
    said = f"{entry['verdict_id']} {entry['action']} {entry['unsafe']!r}"
    print(f"{'differs' if wrong else 'same':<8}{printable(said)}")
    for one in wrong:
        print(f"        {printable(one)}")
    if wrong and here:
        now = surroundings()
        for name in line.host.keys() | now.keys():
            if line.host.get(name) != now.get(name):
                was, is_now = line.host.get(name, "none"), now.get(name, "none")
                print(f"        {name}: {printable(was)} then, {printable(is_now)} here")
