"""What Ray runs for a rank: an actor that lends its process to the worker's code, with an environment set before torch reads it.

Every host of a cluster imports this module by its name. It knows the engine's address and no model.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit import __version__
from quantkit.runtime.network import interface_of
from quantkit.runtime.threads import COUNT, thread_variables
from quantkit.runtime.wire import frame

CONNECT_SECONDS = 20.0


class RankActor:
    """What Ray runs for a rank."""

    def where(self) -> dict[str, Any]:
        """Of the host that Ray chose: its address, GPUs that are ours, and what runs there."""
        import ray

        return {
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", [])],
            "pid": os.getpid(),
            "version": __version__,
        }

    def run(self, engine: tuple[str, int], hello: Mapping[str, Any], host_ranks: int, group: Sequence[Mapping[str, Any]]) -> int:
        """Be a rank of the engine that listens at ``engine`` until it says that this is over; returns an exit code.

        ``group``: where the ranks of this replica are; ``host_ranks``, of all replicas, share this host's cores.
        """
        here = group[hello["rank"]]["address"]
        os.environ.pop(COUNT, None)  # Ray's idea: an actor's CPUs
        os.environ.update(thread_variables(host_ranks))
        gpus = [gpu for where in group if where["address"] == here for gpu in where["gpus"]]
        if gpus:  # the neighbours' too: NCCL reaches them faster where they are seen
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if any(where["address"] != here for where in group):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, interface_of(here) or "")
        connection = socket.create_connection(engine, CONNECT_SECONDS)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":  # an engine whose host is gone: what is sent, every second, stays without an answer
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(CONNECT_SECONDS * 1000))
        connection.sendall(frame(dict(hello)))
        from quantkit.runtime.worker import serve  # which loads torch

        return serve(connection)
