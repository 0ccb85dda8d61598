"""Notice within seconds that a process of a run has died, however many machines they are on.

Whoever waits for a dead process in NCCL waits until the collective's time is up, and that must be long, since a healthy
process may write a checkpoint or draw responses for many minutes. So every process holds a connection to rank 0 for
nothing but its end: the kernel closes it when the process dies, whatever the process was doing. Rank 0 then tells the
others which rank it was. Each of them says so, and ends with exit code 1 unless it ends by itself within a few seconds,
as it does where all ranks meet the same error. A rank that leaves in order says so.

On the wire: a rank greets with the token that rank 0 broadcast and its number in 4 bytes; afterwards either side sends
one number in 4 bytes: its own before leaving in order, or, from rank 0 only, that of the dead.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

NUMBER = struct.Struct("!I")
TOKEN_BYTES = 16
GRACE_S = 5.0
# A machine without power closes nothing: after 15 s of silence the kernel asks three times, 5 s apart.
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class PeerWatch:
    """One connection between rank 0 and each other process.

    Args:
        rank, world_size: this process among all.
        host: a name of rank 0's machine.
        broadcast: gives every rank what rank 0 gives.
    """

    def __init__(self, rank: int, world_size: int, host: str, broadcast: Callable[[Any], Any]) -> None:
        self.rank, self.world_size = rank, world_size
        self._connections: dict[int, socket.socket] = {}
        self._left: set[int] = set()
        if rank == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            with socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both) as server:
                token = secrets.token_bytes(TOKEN_BYTES)
                broadcast((server.getsockname()[1], token))
                while len(self._connections) < world_size - 1:
                    self._greet(server.accept()[0], token)
        else:
            port, token = broadcast(None)
            connection = socket.create_connection((host, port))
            connection.sendall(token + NUMBER.pack(rank))
            self._connections[0] = connection
        for connection in self._connections.values():
            _keep_alive(connection)
        threading.Thread(target=self._watch, name="rlfr peers", daemon=True).start()

    def close(self) -> None:
        """Leave in order: the others go on, or leave too."""
        for connection in self._connections.values():
            try:
                connection.sendall(NUMBER.pack(self.rank))
            except OSError:  # it has left already
                continue

    def _greet(self, connection: socket.socket, token: bytes) -> None:
        greeting = _receive(connection, TOKEN_BYTES + NUMBER.size)
        if greeting[:TOKEN_BYTES] != token:  # not one of ours
            connection.close()
            return
        self._connections[NUMBER.unpack(greeting[TOKEN_BYTES:])[0]] = connection

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(self._left) < len(self._connections):
                for key, _ in selector.select():
                    peer = key.data
                    message = _receive(self._connections[peer], NUMBER.size)
                    named = NUMBER.unpack(message)[0] if message else peer
                    if not message or named != peer:
                        self._end(named)
                    self._left.add(peer)
                    selector.unregister(key.fileobj)

    def _end(self, dead: int) -> None:
        """End this process, whose main thread may be in a collective that will not return."""
        for peer, connection in self._connections.items():
            if self.rank == 0 and peer != dead and peer not in self._left:
                try:
                    connection.sendall(NUMBER.pack(dead))
                except OSError:  # it is dead too
                    continue
        print(
            f"error: rank {dead} of {self.world_size} has ended before its work was done; rank {self.rank} ends too\n\n"
            f"hint: what rank {dead} said last is above, or in its own log; the same command goes on (train-rl with "
            "--resume)",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(GRACE_S)
        os._exit(1)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all three
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or none where the other side has gone."""
    received = b""
    while len(received) < size:
        try:
            part = connection.recv(size - len(received))
        except OSError:  # reset, or silent for too long
            return b""
        if not part:
            return b""
        received += part
    return received
