"""Which of this host's network interfaces an address belongs to. Linux's ioctls, no torch."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B


def interface_of(address: str) -> str | None:
    """The interface that has the IPv4 ``address``, else that of the smallest network it is in; None where there is none, or for IPv6."""
    try:
        wanted = ipaddress.IPv4Address(address)
    except ValueError:
        return None
    near: tuple[int, str] | None = None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                own, mask = (socket.inet_ntoa(fcntl.ioctl(sock, code, request)[20:24]) for code in (_SIOCGIFADDR, _SIOCGIFNETMASK))
            except OSError:  # one without an address
                continue
            network = ipaddress.IPv4Network(f"{own}/{mask}", strict=False)
            if own == address:
                return name
            if wanted in network and (near is None or network.prefixlen > near[0]):
                near = network.prefixlen, name
    return near[1] if near else None
