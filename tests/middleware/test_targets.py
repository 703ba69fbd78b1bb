"""Which strings name a guard, and which of them name several."""

from __future__ import annotations

import pytest

from guard_middleware import AsyncGuardClient, GuardClient, GuardMiddleware
from guard_middleware.targets import XDS_VARIABLES, check_target, is_balanced

ONE = (
    "localhost:50051",
    "guard.llama-guard.svc:50051",
    "127.0.0.1:1",
    "[::1]:65535",
    "dns:50051",  # a host called dns
    "unix:/run/guard.sock",
    "unix:relative.sock",
    "unix-abstract:guard",
)
SEVERAL = (
    "dns:///guard-pods.llama-guard.svc.cluster.local:50051",
    "dns:guard-pods:50051",
    "dns://10.0.0.10:53/guard-pods:50051",
    "ipv4:10.0.0.1:50051,10.0.0.2:50051",
    "ipv6:[2001:db8::1]:50051,[2001:db8::2]:50051",
    "xds:///guard",
    "xds://traffic-director.example/guard.example:443",
)
NONE = (
    "",
    "guard",
    "http://guard:50051",
    "grpc://guard:50051",
    "guard:0",
    "guard:65536",
    "dns:///guard",
    "dns:///guard:70000",
    "ipv4:10.0.0.1:50051,guard:50051",
    "ipv4:",
    "ipv4:10.0.0.1:50051,",
    "ipv4:10.0.0.1:0,10.0.0.2:1",
    "ipv6:::1:50051",
    "xds:///",
    "unix:",
    "unix:/a\nb",
    "a b:1",
    "guard:50051\n",
)


@pytest.mark.parametrize("target", ONE)
def test_plain_addresses_are_of_one_guard(target: str) -> None:
    check_target(target)
    assert not is_balanced(target)


@pytest.mark.parametrize("target", SEVERAL)
def test_names_with_a_scheme_may_be_of_several(target: str) -> None:
    check_target(target)
    assert is_balanced(target)


@pytest.mark.parametrize("target", NONE)
def test_what_is_no_target_is_refused_with_what_is_possible(target: str) -> None:
    with pytest.raises(ValueError, match="dns:///host:port|from 1 to 65535"):
        check_target(target)
    with pytest.raises(ValueError, match="dns:///host:port|from 1 to 65535"):
        GuardClient(target)


async def test_xds_needs_its_bootstrap_file_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in XDS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for make in (GuardClient, AsyncGuardClient):
        with pytest.raises(ValueError, match="GRPC_XDS_BOOTSTRAP must name it"):
            make("xds:///guard")
    with pytest.raises(ValueError, match="GRPC_XDS_BOOTSTRAP must name it"):
        GuardMiddleware(app=None, guard="xds:///guard")  # type: ignore[arg-type]
