"""A contender of `guardctl bench engine` as guardctl sees it: a process that is asked by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from guard_service.cli.peers import Question

_STOP_S = 10.0


@dataclass(slots=True)
class Contender:
    """Fails once at most: from then on `failure` says why and nothing is asked any more."""

    name: str
    kind: str
    path: str
    threads: int
    failure: str = ""
    start: dict[str, float] = field(default_factory=dict)  # seconds, of the last start
    _process: subprocess.Popen[str] | None = None

    def open(self, first: Question) -> None:
        """Start the process. A cold start lasts until its first verdict is there."""
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "guard_service.cli.peers.worker"),
                *(self.kind, self.path, str(self.threads)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            text=True,
        )
        ready = self._read()
        verdict = self.verdict(first, 1)
        if verdict:
            self.start = {"total_s": time.perf_counter() - begun, **(ready or {})}

    def verdict(self, question: Question, decode: int) -> dict[str, Any] | None:
        """See worker; None when it has failed."""
        return self.ask({"do": "verdict", "questions": [question.document()], "decode": decode})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The worker's answer to a line; None when it has failed, now or before."""
        if self.failure or self._process is None:
            return None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; what it said last is read below
        return self._read()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def _read(self) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line:
            self.failure = f"its process ended with status {self._process.wait()}"
        elif "error" in answer:
            self.failure = answer["error"]
        return None if self.failure else answer
