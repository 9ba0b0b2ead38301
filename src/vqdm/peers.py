"""The processes of a launch notice when one of them has ended, and end with it instead of waiting for it for days.

Every process keeps a connection to the first one. The operating system closes the connections of a process however it
ends, and probes whether the other machine is still there. No thread of the other process has to answer for that, so a
long computation or a slow disk is never taken for a death.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vqdm.errors import RunError

# Seconds without traffic before the first probe, seconds between probes, and probes without an answer: a machine that
# lost power or its network is noticed after half a minute.
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
SECONDS_TO_JOIN = 120
SECONDS_TO_SPEAK = 5  # for a caller to say who it is
GOODBYE = b"."


class Peers:
    """This process's connections: of the first process to all others, of any other to the first.

    Attributes:
        links: rank at the other end → connection.
    """

    def __init__(self, rank: int, world: int, local_rank: int, links: dict[int, socket.socket]):
        self.rank, self.world, self.local_rank, self.links = rank, world, local_rank, links
        for link in links.values():
            _probe(link)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    @classmethod
    def join(cls, rank: int, world: int, local_rank: int, agreed: Callable[[Any], Any]) -> Peers:
        """Connect; all processes call it at the same time.

        Args:
            agreed: gives every process the value of the first.

        Raises:
            RunError: the processes cannot reach each other.
        """
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        try:
            links = _accepted(world, agreed) if rank == 0 else {0: _connected(host, rank, *agreed(None))}
        except OSError as error:
            raise RunError(f"process {rank} of {world} cannot connect to {host}: {error}") from None
        return cls(rank, world, local_rank, links)

    def leave(self) -> None:
        """Say that this process is done, so that its end is not taken for a failure."""
        for link in self.links.values():
            _tell(link, GOODBYE)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for other, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, other)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _read(key.fileobj)
                    if said != GOODBYE:
                        self._end(int(said) if said.isdigit() else key.data)
                    selector.unregister(key.fileobj)

    def _end(self, gone: int) -> None:
        """End this process because process `gone` has ended; one process of each machine says so."""
        for other, link in self.links.items():
            if other != gone and self.rank == 0:
                _tell(link, str(gone).encode())
        if self.local_rank == 0 or (self.local_rank == 1 and gone == self.rank - 1):
            line = f"error: process {gone} of {self.world} has ended, and the others end with it"
            advice = "start the same command again, with --resume where it has that flag"
            print(f"{line}; {advice}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # the main thread may wait for the lost process and cannot be woken


def _accepted(world: int, agreed: Callable[[Any], Any]) -> dict[int, socket.socket]:
    """Connections of all other processes to this one, the first; who does not know the word is sent away."""
    word = secrets.token_hex(16)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=world, dualstack_ipv6=dual) as server:
        server.settimeout(SECONDS_TO_JOIN)
        agreed((server.getsockname()[1], word))
        links: dict[int, socket.socket] = {}
        while len(links) < world - 1:
            link, _ = server.accept()
            said = _introduction(link)
            if said[:1] == [word.encode()]:
                links[int(said[1])] = link
            else:
                link.close()
    return links


def _introduction(link: socket.socket) -> list[bytes]:
    """The word and the rank that a caller gives; nothing of one that stays silent, such as a scan of ports."""
    try:
        link.settimeout(SECONDS_TO_SPEAK)
        return link.makefile("rb").readline(100).split()
    except OSError:
        return []


def _connected(host: str, rank: int, port: int, word: str) -> socket.socket:
    link = socket.create_connection((host, port), timeout=SECONDS_TO_JOIN)
    link.sendall(f"{word} {rank}\n".encode())
    return link


def _probe(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # macOS names the first otherwise
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tell(link: socket.socket, message: bytes) -> None:
    with suppress(OSError):  # the other end is gone, which is noticed where it matters
        link.sendall(message)


def _read(link: socket.socket) -> bytes:
    try:
        return link.recv(16)
    except OSError:
        return b""
