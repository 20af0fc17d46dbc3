"""Which interface an address belongs to."""

from __future__ import annotations

import fcntl
import socket

import pytest

from quantkit.runtime import network
from quantkit.runtime.network import interface_of


def test_the_interface_of_an_address_of_this_host() -> None:
    assert interface_of("127.0.0.2") == "lo"
    assert interface_of("203.0.113.9") is None and interface_of("::1") is None and interface_of("host") is None


def test_an_interface_that_has_the_address_is_before_one_whose_network_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"lo": ("127.0.0.1", "255.0.0.0"), "down": None, "tun0": ("10.1.2.3", "255.0.0.0"), "eth0": ("10.0.0.5", "255.255.255.0")}

    def ioctl(sock: socket.socket, code: int, request: bytes) -> bytes:
        found = have[request.rstrip(b"\0").decode()]
        if found is None:
            raise OSError(99, "Cannot assign requested address")
        return bytes(20) + socket.inet_aton(found[code == network._SIOCGIFNETMASK]) + bytes(232)

    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(have, 1)))
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    asked = ("10.0.0.5", "10.1.2.3", "10.0.0.9", "10.9.9.9", "192.168.1.1")
    assert [interface_of(each) for each in asked] == ["eth0", "tun0", "eth0", "tun0", None]
