"""The processes that decode: what they may do, and what comes of those that hang, die or lie."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard_service.errors import NotAssessed, Overloaded, ShuttingDown
from guard_service.images import process
from guard_service.images.decoder import Decoder, DecoderBounds
from guard_service.images.reasons import Reason, Refused
from tests.service.images.drawing import BLUE, RED, drawn

# Runs in the process in place of what is there, in the child of every image.
BEGIN = "import sys; sys.path[:] = {}; from guard_service.images import worker; "
RUN = "; worker.main({}, {})"
DIES = BEGIN + "import os; worker.probe = lambda *_: os.kill(os.getpid(), 11)" + RUN
HANGS = BEGIN + "import time; worker.probe = lambda *_: time.sleep(60)" + RUN
# Orphans become its children, as those of the first process of a container do.
ADOPTS = f"""
import ctypes, os, pathlib, signal, threading
from guard_service.images import process
from guard_service.images.reasons import Refused

process.CODE = {HANGS!r}
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
one = process.DecoderProcess(1000, 3.0)
pid = one._popen.pid

def decode():
    try:
        one.decode(b"x")
    except Refused as refused:
        print(refused)

decoding = threading.Thread(target=decode)
decoding.start()
while decoding.is_alive() and not pathlib.Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text():
    pass
os.kill(pid, signal.SIGSTOP)  # it does not get to see its child die
decoding.join()
try:
    print(os.waitid(os.P_PGID, pid, os.WEXITED))
except ChildProcessError:
    print("none is left")
"""
TRIES = """
import sys; sys.path[:] = {}
import os, socket
from guard_service.images import worker
from guard_service.images.reasons import Reason, Refused

def tried(data, most):
    for what in (
        lambda: open("/etc/passwd"),
        lambda: open("/dev/null", "wb"),
        lambda: socket.socket(),
        lambda: os.pipe(),
        lambda: os.dup(3),
        lambda: bytearray(2**30),
    ):
        try:
            what()
        except (OSError, MemoryError):
            continue
        raise Refused(Reason.UNSUPPORTED)
    raise Refused(Reason.EMPTY)

worker.probe = tried
worker.main({}, {})
"""
LIES = {
    "a view larger than may be": "[(1025, 1024, bytes(1025 * 1024 * 3))]",
    "a view of no size": "[(0, 5, b'')]",
    "no view": "[]",
    "seven views": "[(1, 1, b'abc')] * 7",
    "fewer rows than it says": "[(2, 2, b'')]",
    "no numbers": "[('x', 'y', b'')]",
    "a long answer": "[(1, 1, b'abc')] * 5000",
}


@pytest.fixture
def decoders() -> Iterator[list[Decoder]]:
    """Closed when the test ends."""
    made: list[Decoder] = []
    yield made
    for one in made:
        one.close()


def decoder(
    made: list[Decoder], workers: int = 1, timeout_s: float = 20.0, held_bytes: int = 2**20
) -> Decoder:
    made.append(Decoder(DecoderBounds(workers, 2**20, timeout_s, held_bytes)))
    return made[-1]


async def reason(decoding: Decoder, data: bytes) -> Reason:
    with pytest.raises(Refused) as refused:
        await decoding.decode(data)
    return refused.value.reason


def processes(decoding: Decoder) -> list[int]:
    return [one._popen.pid for one in decoding._processes]


async def test_a_process_serves_many_images(decoders: list[Decoder]) -> None:
    decoding = decoder(decoders)
    found = await asyncio.gather(*(decoding.decode(drawn(one)) for one in (RED, BLUE, RED)))
    assert [tuple(one.views[0].pixels[0, 0]) for one in found] == [RED, BLUE, RED]
    assert found[0].digest == found[2].digest != found[1].digest
    assert len(processes(decoding)) == 1


async def test_a_process_that_hangs_is_killed_and_replaced(decoders: list[Decoder]) -> None:
    decoding = decoder(decoders, timeout_s=1.5)
    await decoding.decode(drawn())
    (hanging,) = processes(decoding)
    os.kill(hanging, signal.SIGSTOP)
    assert await reason(decoding, drawn()) is Reason.TOO_COSTLY
    assert not Path(f"/proc/{hanging}").exists()
    assert (await decoding.decode(drawn())).frames == 1


def test_a_child_that_hangs_leaves_no_zombie() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, "-c", ADOPTS]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.stdout == "IMAGE_TOO_COSTLY\nnone is left\n", done.stderr


async def test_a_process_that_is_killed_is_replaced(decoders: list[Decoder]) -> None:
    decoding = decoder(decoders)
    await decoding.decode(drawn())
    (killed,) = processes(decoding)
    os.kill(killed, signal.SIGKILL)
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    assert (await decoding.decode(drawn())).frames == 1
    assert killed not in processes(decoding)


async def test_a_child_that_dies_takes_nothing_along(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CODE", DIES)
    decoding = decoder(decoders)
    assert [await reason(decoding, drawn()) for _ in range(2)] == [Reason.DECODER_DIED] * 2
    assert len(processes(decoding)) == 1


async def test_a_child_opens_nothing_and_has_little_memory(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CODE", TRIES)
    assert await reason(decoder(decoders), drawn()) is Reason.EMPTY


@pytest.mark.parametrize("views", LIES.values(), ids=LIES)
async def test_what_a_child_tells_is_not_believed(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch, views: str
) -> None:
    monkeypatch.setattr(process, "CODE", f"{BEGIN}worker.views = lambda *_: {views}{RUN}")
    assert await reason(decoder(decoders), drawn()) is Reason.DECODER_DIED


async def test_without_a_process_there_is_no_answer(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = decoder(decoders)
    monkeypatch.setattr(process, "CODE", "{}{}{}; raise SystemExit")
    with pytest.raises(NotAssessed, match="does not come up"):
        await decoding.decode(drawn())
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(NotAssessed, match="cannot be started"):
        await decoding.decode(drawn())
    assert not processes(decoding)


async def test_what_is_held_is_counted_and_bounded(decoders: list[Decoder]) -> None:
    decoding = decoder(decoders, held_bytes=1)
    file = drawn()
    held = [await decoding.decode(file)]
    assert decoding.held_bytes == 40 * 30 * 3 + len(file)
    with pytest.raises(Overloaded, match="too many images"):
        await decoding.decode(file)
    held.clear()
    gc.collect()
    assert decoding.held_bytes == 0
    await decoding.decode(file)


async def test_a_closed_decoder_leaves_no_process_and_starts_none(decoders: list[Decoder]) -> None:
    decoding = decoder(decoders, workers=2)
    await asyncio.gather(*(decoding.decode(drawn()) for _ in range(4)))
    left = processes(decoding)
    decoding.close()
    assert left and not any(Path(f"/proc/{one}").exists() for one in left)
    with pytest.raises((ShuttingDown, RuntimeError)):
        await decoding.decode(drawn())
