"""The part of the policy language that says from where images may be fetched."""

from __future__ import annotations

import re

from guard_policies.positions import Entry, Reader, quote
from guard_policies.schema import ImageUris

KEYS = ("hosts", "ports", "schemes")
SCHEMES = ("https", "http")
_LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
# The last label holds a letter, so that no number is a host.
HOST = re.compile(rf"(\*\.)?({_LABEL}\.)+(?=[0-9-]*[a-z]){_LABEL}")


def read_image_uris(reader: Reader, entry: Entry | None) -> ImageUris:
    """From the file's node; mistakes go to the reader."""
    if entry is None:
        return ImageUris()
    entries = reader.table(entry.value, "image_uris", KEYS)
    if "hosts" not in entries:
        reader.report(entry.key, "image_uris needs 'hosts': the hosts that may be asked")
    usual = ImageUris()
    return ImageUris(
        hosts=tuple(_hosts(reader, entries.get("hosts"))),
        ports=tuple(_ports(reader, entries.get("ports"))) or usual.ports,
        schemes=tuple(_schemes(reader, entries.get("schemes"))) or usual.schemes,
    )


def _hosts(reader: Reader, entry: Entry | None) -> list[str]:
    hosts = []
    for node in reader.items(entry.value, "hosts") if entry else ():
        host = reader.text(node, "a host", 253)
        if host is not None and not HOST.fullmatch(host):
            reader.report(
                node,
                f"{quote(host)} is no host like 'images.example.org' or '*.example.org', in lower "
                "case, and in the xn-- form where it has other letters",
            )
        elif host is not None:
            hosts.append(host)
    return hosts


def _ports(reader: Reader, entry: Entry | None) -> list[int]:
    nodes = reader.items(entry.value, "ports") if entry else ()
    return [port for node in nodes if (port := reader.integer(node, "a port", 1, 65535))]


def _schemes(reader: Reader, entry: Entry | None) -> list[str]:
    nodes = reader.items(entry.value, "schemes") if entry else ()
    return [word for node in nodes if (word := reader.word(node, "a scheme", SCHEMES))]
