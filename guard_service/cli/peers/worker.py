"""One contender in a process of its own: `python -m guard_service.cli.peers.worker KIND PATH N`.

Reads one JSON object a line from standard input and answers each with one; the first answer comes
unasked when the model is loaded. An answer with "error" is the last. Whatever libraries print goes
to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard_service.cli.peers import Peer, Question, open_peer

_MOST_ERROR = 300  # characters


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for guardctl, which then ends us
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, path, threads = sys.argv[1:]

    def answer(document: Mapping[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    try:
        start = time.perf_counter()
        peer = open_peer(kind, Path(path), int(threads))
        answer({"start_s": time.perf_counter() - start, "load_s": getattr(peer, "load_s", None)})
        for line in sys.stdin:
            answer(answered(peer, json.loads(line)))
    except Exception as error:  # a peer's library may raise anything, and the others go on
        name = type(error).__name__
        answer({"error": f"{name}: {error}"[:_MOST_ERROR]})


def answered(peer: Peer, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the peer does about a line, timed around its own work."""
    questions = [Question.of(one) for one in asked.get("questions", ())]
    match asked["do"]:
        case "verdict":
            start = time.perf_counter()
            found = peer.verdict(questions[0], asked["decode"])
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "tokens": found.computed, "written": found.written}
        case "stream":
            from guard_service.cli.peers.ours import Ours

            assert isinstance(peer, Ours)
            return peer.stream(questions)
        case "memory":
            return memory()
    raise ValueError(f"unknown request {asked['do']!r}")


def memory() -> dict[str, float]:
    """This process's resident memory in MiB, now and at most, files that it maps included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"rss_mib": int(sizes["VmRSS"]) / 1024, "peak_mib": int(sizes["VmHWM"]) / 1024}


if __name__ == "__main__":
    main()
