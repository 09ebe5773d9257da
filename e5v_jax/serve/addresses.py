"""Which addresses of the internet a server may be sent to by a stranger: the public ones."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address

# 64:ff9b::/96 holds IPv4 addresses (RFC 6052); a network without IPv4 reaches all of it this way
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What ``is_global`` takes for public, and is not.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's host: it answers its own machines with their settings
        "192.88.99.0/24",  # relays of 6to4 (RFC 7526: withdrawn)
        "2002::/16",  # 6to4: holds an IPv4 address, be it a private one
        "2001::/32",  # Teredo: so does this
        "fec0::/10",  # IPv6's first private addresses (RFC 3879: withdrawn)
    )
)


def is_public(address: str) -> bool:
    """Tell whether an IPv4 or IPv6 address is one of the public internet.

    Refused are private, loopback, link-local (where clouds keep their credentials), shared,
    multicast, reserved and documentation addresses, also where an IPv6 address holds one of IPv4.

    Raises:
        ValueError: ``address`` is not an address in its usual form: ``127.1``, ``0x7f.0.0.1`` or
            ``2130706433`` are not.
    """
    return _is_public(ipaddress.ip_address(address))


def _is_public(ip: IPv4Address | IPv6Address) -> bool:
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is not None:
            return _is_public(ip.ipv4_mapped)
        if ip in _NAT64:
            return _is_public(IPv4Address(int(ip) & 0xFFFF_FFFF))
    return (
        ip.is_global
        and not (ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_unspecified)
        and not (ip.is_multicast or ip.is_reserved)
        and not any(ip in network for network in _NOT_PUBLIC)
    )
