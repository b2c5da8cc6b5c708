"""A proxy in front of an S3 server, which cuts or holds an upload in the middle of its body."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Literal

Way = Literal["cut", "hold", "refuse", "ignore"]

CHUNK = 1 << 16
LEAST = 200  # bytes of a body that is worth cutting


class Proxy:
    """Hands everything on, but for the uploads (PUT or POST with a body) that it is told to break.

    ``cut``: the connection ends when half of the body went on. ``hold``: half went on, and no more comes, until whoever
    sends it is gone. ``refuse``: every connection and request ends at once, from then on. ``ignore``: every connection
    and request is taken and never answered, from then on.
    """

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition("//")[2].partition(":")
        self._target = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._lock = threading.Lock()
        self._plan: dict[int, Way] = {}
        self._always: Way | None = None
        self.uploads = 0  # how many began
        self.cut = 0  # how many were broken
        self.waiting = 0  # how many ask for leave before they send their body
        self.refused = 0  # and ignored
        self.holding = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.close()

    def break_upload(self, further: int, how: Way) -> None:
        """Break the ``further``-th upload from now."""
        with self._lock:
            self._plan[self.uploads + further] = how

    def heal(self) -> None:
        """Hand everything on again."""
        with self._lock:
            self._plan, self._always = {}, None
            self.holding.clear()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self._always == "refuse":
                self.refused += 1
                return
            with socket.create_connection(self._target) as server:
                threading.Thread(target=_pump, args=(server, client), daemon=True).start()
                buffered = b""
                while True:
                    while b"\r\n\r\n" not in buffered:
                        received = client.recv(CHUNK)
                        if not received:
                            return
                        buffered += received
                    head, _, buffered = buffered.partition(b"\r\n\r\n")
                    size = _content_length(head)
                    how = self._fate(head, size)
                    if how == "refuse":
                        return
                    if how == "ignore":
                        while client.recv(CHUNK):
                            pass
                        return
                    server.sendall(head + b"\r\n\r\n")
                    left = size if how is None else size // 2
                    while left:
                        part = buffered[:left] or client.recv(min(left, CHUNK))
                        if not part:
                            return
                        server.sendall(part)
                        buffered, left = buffered[len(part) :], left - len(part)
                    if how == "cut":
                        return
                    if how == "hold":
                        self.holding.set()
                        while client.recv(CHUNK):
                            pass
                        return

    def _fate(self, head: bytes, size: int) -> str | None:
        with self._lock:
            if self._always is not None:
                self.refused += 1
                return self._always
            if not head.startswith((b"PUT ", b"POST ")) or size < LEAST:
                return None
            self.uploads += 1
            self.waiting += b"100-continue" in head
            how = self._plan.get(self.uploads)
            if how in ("refuse", "ignore"):
                self._always = how
            if how is not None:
                self.cut += 1
            return how


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
        assert name.lower() != b"transfer-encoding", "bodies of unknown size are not understood here"
    return 0


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(CHUNK):
            target.sendall(part)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
