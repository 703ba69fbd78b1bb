"""Which network addresses are anybody's, and which lead into somebody's own network."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

# The registries of IANA for special purposes (RFC 6890 and later), written out, since what Python
# takes for global differs between its versions; and what is reached through them.
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",
            "100.64.0.0/10",  # carriers' NAT
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's own service, under a public address
            "169.254.0.0/16",  # link-local: the metadata services of clouds
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",
            "192.52.193.0/24",
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # Teredo among them
            "2001:db8::/32",
            "2002::/16",  # 6to4
            "2620:4f:8000::/48",
            "3fff::/20",  # documentation
        ),
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")  # all else is local, mapped, translated or unassigned


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is a public one; what is no address is not."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if found.version == 6 and found not in _GLOBAL_UNICAST:
        return False
    return not any(found in network for network in _NOT_PUBLIC if _alike(network, found.version))


def _alike(network: IPv4Network | IPv6Network, version: int) -> bool:
    return network.version == version
