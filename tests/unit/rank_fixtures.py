"""What the kernel knows of a process's sockets. No package is needed for it."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

_LISTENING = "0A"


def heard_at(pids: Iterable[int]) -> set[str]:
    """The addresses at which these processes, of this user, listen for TCP."""
    found = set()
    for pid in pids:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        ours = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and fields[9] in ours:
                    found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(words: str) -> str:
    """An address as /proc/net has it: words of 32 bits in the machine's order."""
    data = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(data)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
