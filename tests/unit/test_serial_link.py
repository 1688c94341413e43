"""What is a serial link's alone: where a session begins and ends in a stream that has no borders."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.link import PortLink
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.port_stream import (
    Decoder,
    Lost,
    Mark,
    MarkKind,
    encode_mark,
    encode_payload,
)

BOOT = encode_mark(MarkKind.BOOT, "b" * 32)
OTHER_ANSWER = encode_mark(MarkKind.ANSWER, "c" * 32)


class Port:
    """The guest's end of a port, step by step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self._server.settimeout(10)
        self._decoder = Decoder(MarkKind.SYNC)
        self._events: list[bytes | Mark | Lost] = []
        self.connection = socket.socket()

    def accept(self) -> None:
        self.connection.close()
        self.connection, _ = self._server.accept()
        self.connection.settimeout(10)

    def next(self) -> bytes | Mark | Lost:
        """What comes next: a mark, or a piece of payload."""
        while not self._events:
            data = self.connection.recv(1 << 16)
            assert data, "the host is gone"
            self._events += self._decoder.receive_data(data)
        return self._events.pop(0)

    def sync(self) -> str:
        """The nonce of the next mark; what comes before it is dropped."""
        while not isinstance(event := self.next(), Mark):
            pass
        return event.nonce

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def answer(self) -> None:
        """Take part in the beginning of a session, as a guest that is at its beginning."""
        self.send(encode_mark(MarkKind.ANSWER, self.sync()))

    def close(self) -> None:
        self._server.close()
        self.connection.close()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    port = Port(tmp_path / "port")
    yield port
    port.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def link(port: Port, pool: ThreadPoolExecutor) -> Iterator[SerialLink]:
    """A link whose session has begun."""
    making = pool.submit(SerialLink, port.path, timeout=10)
    port.accept()
    port.answer()
    link = making.result(10)
    yield link
    link.close()


def receive(link: SerialLink, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := link.receive()):
        data += more
    return data


class TestTheBeginning:
    def test_is_asked_for_until_somebody_answers(
        self, port: Port, pool: ThreadPoolExecutor
    ) -> None:
        making = pool.submit(SerialLink, port.path, timeout=10)
        port.accept()
        nonces = {port.sync() for _ in range(3)}
        assert len(nonces) == 1
        port.send(encode_mark(MarkKind.ANSWER, nonces.pop()))
        making.result(10).close()

    def test_is_behind_all_that_was_there_before(
        self, port: Port, pool: ThreadPoolExecutor
    ) -> None:
        making = pool.submit(SerialLink, port.path, timeout=10)
        port.accept()
        port.send(b"SeaBIOS (version 1.16)\r\n}~~A12" + BOOT + b"half a frame of an earlier host")
        port.send(OTHER_ANSWER + b"another half")
        nonce = port.sync()
        port.send(encode_mark(MarkKind.ANSWER, nonce) + encode_payload(b"~ours}"))
        port.send(encode_mark(MarkKind.ANSWER, nonce) + b"too")
        link = making.result(10)
        assert receive(link, 9) == b"~ours}too"
        link.close()

    def test_is_a_timeout_where_nobody_answers(self, port: Port) -> None:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no agent answered at .*port within 0\.2 s"):
            SerialLink(port.path, timeout=0.2)
        assert time.monotonic() - start < 5

    def test_is_a_timeout_where_nobody_reads(self, port: Port) -> None:
        """As QEMU's socket is whose one client is another program."""
        with ExitStack() as others:
            waiting = 0
            while waiting == 0:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                waiting = other.connect_ex(str(port.path))
            with pytest.raises(TimeoutError, match=r"took no connection within 0\.2 s"):
                SerialLink(port.path, timeout=0.2)

    def test_comes_when_there_is_room(self, port: Port, pool: ThreadPoolExecutor) -> None:
        with ExitStack() as others:
            waiting = 0
            while waiting == 0:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                waiting = other.connect_ex(str(port.path))
            making = pool.submit(SerialLink, port.path, timeout=10)
        # The others have gone, but not out of the queue.
        answered = False
        while not answered:
            port.accept()
            with suppress(AssertionError, ConnectionError):  # one of the others
                port.answer()
                answered = True
        making.result(10).close()

    def test_is_an_error_where_no_socket_is(self, tmp_path: Path) -> None:
        with pytest.raises(LinkError, match=r"nowhere can't be connected to: .*No such file"):
            SerialLink(tmp_path / "nowhere", timeout=10)

    def test_is_an_error_where_the_machine_ends_meanwhile(
        self, port: Port, pool: ThreadPoolExecutor
    ) -> None:
        making = pool.submit(SerialLink, port.path, timeout=10)
        port.accept()
        port.connection.close()
        with pytest.raises(LinkError, match="the virtual machine's port is gone"):
            making.result(10)


class TestTheEnd:
    @pytest.mark.parametrize("mark", [BOOT, OTHER_ANSWER], ids=["boot", "answer"])
    def test_is_where_another_agent_begins(self, port: Port, link: SerialLink, mark: bytes) -> None:
        port.send(b"the last" + mark + b"not ours")
        assert receive(link, 9) == b"the last"
        assert link.receive() == b""
        assert link.ended == "the program in the guest was started anew"
        with pytest.raises(LinkError, match="the agent is gone: .* started anew"):
            link.send(b"x", 1)

    def test_is_where_bytes_make_no_sense(self, port: Port, link: SerialLink) -> None:
        port.send(b"good}bad")
        assert receive(link, 5) == b"good"
        assert link.receive() == b""
        assert link.ended is not None

    def test_is_the_machine_s(self, port: Port, link: SerialLink) -> None:
        port.connection.close()
        assert link.receive() == b""
        assert link.ended == "the virtual machine's port is gone"


class TestResync:
    def test_begins_anew_in_the_middle_of_anything(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        for rest in (b"", b"half a frame", b"}", b"~", b"~~A0123", BOOT, b"}x garbage"):
            link.send(b"what nobody answers", 1)
            resyncing = pool.submit(link.resync, 10)
            nonce = port.sync()
            port.send(rest + encode_mark(MarkKind.ANSWER, nonce) + encode_payload(b"new~"))
            resyncing.result(10)
            assert receive(link, 4) == b"new~"
            assert link.ended is None
            link.send(b"asked", 1)
            assert port.next() == b"asked"

    def test_begins_anew_behind_the_end_of_a_session(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        port.send(BOOT)
        assert link.receive() == b""
        resyncing = pool.submit(link.resync, 10)
        port.answer()
        resyncing.result(10)
        port.send(b"new")
        assert receive(link, 3) == b"new"

    def test_drops_what_was_received_and_not_taken(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        port.send(b"old")
        resyncing = pool.submit(link.resync, 10)
        port.answer()
        resyncing.result(10)
        port.send(b"new")
        assert receive(link, 3) == b"new"

    def test_drops_the_rest_of_what_was_not_sent_whole(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        link.send(b"x" * (4 << 20), 0.1)
        resyncing = pool.submit(link.resync, 10)
        port.answer()
        resyncing.result(10)
        link.send(b"new", 1)
        assert port.next() == b"new"

    def test_wakes_who_waits(self, port: Port, link: SerialLink, pool: ThreadPoolExecutor) -> None:
        receiving = pool.submit(link.receive)
        sending = pool.submit(link.send, b"x" * (4 << 20), 100)
        link.suspend()
        assert receiving.result(10) == b""
        with pytest.raises(LinkError, match="being put back"):
            sending.result(10)
        assert link.receive() == b""
        with pytest.raises(LinkError, match="being put back"):
            link.send(b"x", 1)

    def test_may_be_tried_again_behind_a_timeout(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        with pytest.raises(TimeoutError, match="no agent answered"):
            link.resync(0.1)
        assert link.receive() == b""
        old = port.sync()
        resyncing = pool.submit(link.resync, 10)
        while (nonce := port.sync()) == old:
            pass
        port.send(encode_mark(MarkKind.ANSWER, old) + encode_mark(MarkKind.ANSWER, nonce))
        resyncing.result(10)
        assert link.ended is None

    def test_is_refused_when_the_link_is_closed(self, link: SerialLink) -> None:
        link.close()
        link.suspend()
        with pytest.raises(LinkError, match="closed"):
            link.resync(1)

    def test_ends_when_the_link_is_closed_meanwhile(
        self, port: Port, link: SerialLink, pool: ThreadPoolExecutor
    ) -> None:
        resyncing = pool.submit(link.resync, 100)
        port.sync()
        link.close()
        with pytest.raises(LinkError, match="closed"):
            resyncing.result(10)

    def test_is_what_a_port_s_link_can(self, link: SerialLink) -> None:
        assert isinstance(link, PortLink)


def test_what_comes_byte_by_byte_is_whole(
    port: Port, link: SerialLink, pool: ThreadPoolExecutor
) -> None:
    received = pool.submit(receive, link, 256)
    for byte in encode_payload(bytes(range(256))):
        port.send(bytes([byte]))
    assert received.result(10) == bytes(range(256))
