"""The process that decodes: it stands ready, and forks a child for every image.

Nothing that one image does to its child reaches another image, or the service. The child has bounds
of memory and time, can open no file and no connection, and holds one end of a connection that was
made for its image. For each image the service sends that end over the process's standard input, a
socket, and gets a byte back when the child has ended: zero when it ended well.

On the image's connection either side sends a frame, a length of 4 bytes and as many bytes: the
image, and JSON, `{"views": [[width, height], ...], "frames": n, "format": "PNG"}` or
`{"refused": reason}`. Behind that come the RGB rows of each view.
"""

from __future__ import annotations

import json
import os
import resource
import socket
from typing import Any

from guard_service.images.frames import receive, send
from guard_service.images.probe import probe
from guard_service.images.reasons import Refused
from guard_service.images.views import views

BASE_BYTES = 256 * 2**20  # the interpreter and Pillow, with room
BYTES_OF_PIXEL = 32  # coefficients of a progressive JPEG, copies, views


def main(max_pixels: int, cpu_s: int) -> None:
    """Serve until the service closes the connection."""
    memory = BASE_BYTES + max_pixels * BYTES_OF_PIXEL
    control = socket.socket(fileno=0)
    control.send(b"\0")  # ready
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            child = os.fork()
            if not child:
                control.close()
                _judge_and_exit(connection, max_pixels, memory, cpu_s)
        _, status = os.waitpid(child, 0)
        control.send(bytes([status != 0]))


def _judge_and_exit(connection: socket.socket, max_pixels: int, memory: int, cpu_s: int) -> None:
    status = 1
    try:
        _confine(memory, cpu_s)
        if (data := receive(connection)) is not None:
            _answer(connection, data, max_pixels)
            status = 0
    finally:
        os._exit(status)


def _confine(memory: int, cpu_s: int) -> None:
    """Without room for a file descriptor nothing can be opened."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (most, most))


def _answer(connection: socket.socket, data: bytes, max_pixels: int) -> None:
    answer: dict[str, Any]
    found = []
    try:
        probed = probe(data, max_pixels)
        found = views(data, probed)
        answer = {
            "views": [[width, height] for width, height, _ in found],
            "frames": probed.frames,
            "format": probed.format,
        }
    except Refused as refused:
        answer = {"refused": refused.reason.value}
    send(connection, json.dumps(answer).encode())
    for _, _, rows in found:
        connection.sendall(rows)
