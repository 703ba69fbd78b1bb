"""Where a guard is: one server, or a name for several of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

FORMS = (
    "host:port, unix:/path, dns:///host:port, ipv4:address:port,address:port, ipv6:[address]:port "
    "or xds:///name"
)
XDS_VARIABLES = ("GRPC_XDS_BOOTSTRAP", "GRPC_XDS_BOOTSTRAP_CONFIG")

_PLACE = r"(?:\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}"
_LIST = r"{0}(?:,{0})*"
_KINDS: Mapping[str, re.Pattern[str]] = {
    "unix": re.compile(r"unix:.+"),
    "unix-abstract": re.compile(r"unix-abstract:.+"),
    "dns": re.compile(rf"dns:(?://[^/]*/)?{_PLACE}"),
    "ipv4": re.compile("ipv4:" + _LIST.format(r"[0-9]+(?:\.[0-9]+){3}:[0-9]{1,5}")),
    "ipv6": re.compile("ipv6:" + _LIST.format(r"\[[0-9A-Fa-f:.%a-z]+\]:[0-9]{1,5}")),
    "xds": re.compile(r"xds:(?://[^/]*/)?[^/\s].*"),
}
_ONE = re.compile(_PLACE)
_PORTS = re.compile(r":([0-9]{1,5})(?=,|$)")


def check_target(target: str) -> None:
    """Raises ValueError, which says what is possible, for what is no target."""
    kind = _kind(target)
    form = _KINDS[kind] if kind else _ONE
    if not form.fullmatch(target) or not target.isprintable():
        raise ValueError(f"{target!r} is no guard's address; it must be {FORMS}")
    if kind in ("unix", "unix-abstract", "xds"):
        return
    if not all(0 < int(port) < 65536 for port in _PORTS.findall(target)):
        raise ValueError(f"{target!r}: a port is a number from 1 to 65535")


def check_reachable(target: str, environment: Mapping[str, str]) -> None:
    """Raises ValueError where gRPC lacks what it needs for a kind of target."""
    if _kind(target) == "xds" and not any(environment.get(name) for name in XDS_VARIABLES):
        raise ValueError(
            f"{target!r} needs a bootstrap file: {XDS_VARIABLES[0]} must name it "
            f"({XDS_VARIABLES[1]} may hold it)"
        )


def is_balanced(target: str) -> bool:
    """Whether the target names any number of servers, among which calls are spread."""
    return _kind(target) in ("dns", "ipv4", "ipv6", "xds")


def _kind(target: str) -> str:
    """The scheme; empty for a plain host:port, even of a host called `dns`."""
    kind, _, rest = target.partition(":")
    return kind if kind in _KINDS and not rest.isdigit() else ""
