"""A kernel that only prints: ``python kd_sender.py SOCKET COUNT``, in a process of its own.

Serves one host at the Unix socket SOCKET, and waits for the acknowledgement of each print, by its id, before
it sends the next, as a kernel does. The standard library is all it takes. At the end it writes a JSON object:
``seconds`` for all, and ``longest`` for one print and its acknowledgement.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from typing import Final

LENGTH: Final = 60
"""Bytes that a print says, its number and the newline among them."""

_HEADER: Final = struct.Struct("<IHHII")
"""Leader, type, size of the payload, id, sum of the payload's bytes."""

_HEAD: Final = struct.pack("<IHHII", 0x3230, 15, 0, LENGTH, 0)
"""DbgKdPrintStringApi, processor level, processor, length."""

_TAIL: Final = b"x" * (LENGTH - 10) + b"\n"
INITIAL: Final = 0x80800000
_SYNC: Final = 0x800


def text(number: int) -> bytes:
    """What the print ``number`` says."""
    return b"%08d " % number + _TAIL


def acknowledgement(identifier: int) -> bytes:
    """The packet that acknowledges the one of this id."""
    return _HEADER.pack(0x69696969, 4, 0, identifier, 0)


def send(connection: socket.socket, count: int) -> dict[str, float]:
    """Print so often; what it took."""
    acknowledgements = acknowledgement(INITIAL), acknowledgement(INITIAL | 1)
    identifier = INITIAL | _SYNC
    longest = 0.0
    begin = sent = time.perf_counter()
    for number in range(count):
        payload = _HEAD + text(number)
        header = _HEADER.pack(0x30303030, 3, len(payload), identifier, sum(payload))
        connection.sendall(header + payload + b"\xaa")
        answer = connection.recv(1 << 16)
        if answer != acknowledgements[number & 1]:
            raise ValueError(f"print {number} was answered by {answer.hex(' ')}")
        identifier = INITIAL | (number & 1 ^ 1)
        now = time.perf_counter()
        longest, sent = max(longest, now - sent), now
    return {"seconds": sent - begin, "longest": longest}


def main() -> None:
    path, count = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        connection, _ = server.accept()
        with connection:
            print(json.dumps(send(connection, int(count))))


if __name__ == "__main__":
    main()
