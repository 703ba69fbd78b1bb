"""Bytes of a stated length over a socket: how the service and the processes that decode talk."""

from __future__ import annotations

import socket


def send(connection: socket.socket, frame: bytes) -> None:
    """Write a frame; raises OSError."""
    connection.sendall(len(frame).to_bytes(4, "big"))
    connection.sendall(frame)


def receive(connection: socket.socket) -> bytes | None:
    """Read a frame; None where the connection ends before it does."""
    head = connection.recv(4, socket.MSG_WAITALL)
    data = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return data if len(head) == 4 and len(data) == int.from_bytes(head, "big") else None
