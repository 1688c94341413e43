"""The agent's side of its protocol, at a guest's port: frames in, frames out, whoever answers them.

By our own codecs, which are held against the real agent's elsewhere (``tests/wine``, ``make check``).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_kdriver.errors import AgentProtocolError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.frames import MAX_BODY, Decoder, Frame, Kind, encode
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.port_stream import Decoder as PortDecoder
from pytest_kdriver.port_stream import Mark, MarkKind, encode_mark, encode_payload, new_nonce

Serve = Callable[[Message], Message | None]
"""A request's answer; None for none, ever: the guest has stopped."""

PATIENCE = 30.0


class _Session:
    """What one host has begun, up to the next host's mark."""

    def __init__(self) -> None:
        self.decoder = Decoder()
        self.over = False


class AgentServer:
    """A Unix socket in the place of QEMU's, and the agent behind it, which serves one host after the other.

    Before its ``start``, and while it is frozen, it takes nothing from its port and puts nothing there; what
    was sent meanwhile is taken behind that.
    """

    def __init__(self, path: Path, serve: Serve) -> None:
        self._serve = serve
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(4)
        self._connection: socket.socket | None = None
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._frozen = True
        self._closed = False
        self._begin()
        self._thread = threading.Thread(target=self._accept, name="nt-agent", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        """Forget who was there, and all of theirs up to the next mark."""
        self._session: _Session | None = None
        self._nonce = ""
        self._port = PortDecoder(MarkKind.SYNC)

    def freeze(self) -> None:
        """Stop, in the middle of whatever is being done."""
        with self._changed:
            self._frozen = True
            if self._session is not None:
                self._session.over = True

    def start(self) -> None:
        """Begin to serve the port, behind a boot."""
        with self._changed:
            self._begin()
            self._frozen = False
            self._write(encode_mark(MarkKind.BOOT, new_nonce()), None)
            self._changed.notify_all()

    def thaw(self) -> None:
        """Go on in the state that a snapshot has: parked, without a session."""
        with self._changed:
            self._begin()
            self._frozen = False
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            connection = self._connection
        for end in (self._server, connection):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closed:
                connection, _ = self._server.accept()
                with connection:
                    self._connection = connection
                    with suppress(OSError):
                        self._read(connection)
                    self._connection = None

    def _read(self, connection: socket.socket) -> None:
        while self._wait_until_running() and (data := connection.recv(1 << 16)):
            if not self._wait_until_running():
                return
            for event in self._port.receive_data(data):
                self._take(event)

    def _wait_until_running(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen or self._closed)
            return not self._closed

    def _take(self, event: object) -> None:
        match event:
            case Mark():
                if event.nonce != self._nonce:
                    if self._session is not None:
                        self._session.over = True
                    self._session, self._nonce = _Session(), event.nonce
                self._write(encode_mark(MarkKind.ANSWER, event.nonce), None)
            case bytes() if self._session is not None:
                self._take_payload(event, self._session)
            case _:
                pass

    def _take_payload(self, data: bytes, session: _Session) -> None:
        try:
            frames = session.decoder.receive_data(data)
            while frames:
                for frame in frames:
                    worker = threading.Thread(
                        target=self._answer, args=(frame, session), name="nt-request", daemon=True
                    )
                    worker.start()
                frames = session.decoder.receive_data(b"")
        except AgentProtocolError as error:
            complaint = messages.Error(domain=0, code=0, message=str(error))
            self._send(session, Kind.ERROR, 0, 0, to_bytes(complaint))
            self._session, self._port = None, PortDecoder(MarkKind.SYNC)

    def _answer(self, frame: Frame, session: _Session) -> None:
        request = from_bytes(messages.OPERATIONS[frame.operation - 1].request, frame.body)
        answer = self._serve(request)
        if answer is None:
            return
        kind = Kind.ERROR if isinstance(answer, messages.Error) else Kind.REPLY
        body = to_bytes(answer)
        while len(body) > MAX_BODY:
            self._send(session, Kind.PART, frame.operation, frame.request, body[:MAX_BODY])
            body = body[MAX_BODY:]
        self._send(session, kind, frame.operation, frame.request, body)

    def _send(
        self, session: _Session, kind: Kind, operation: int, request: int, body: bytes
    ) -> None:
        frame = Frame(kind=kind, operation=operation, request=request, body=body)
        self._write(encode_payload(encode(frame)), session)

    def _write(self, data: bytes, session: _Session | None) -> None:
        with self._writing:
            connection = self._connection
            if connection is None or self._frozen or (session is not None and session.over):
                return
            with suppress(OSError):
                connection.sendall(data)
