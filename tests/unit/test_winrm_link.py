"""What is a WinRM link's alone: who is there, who we are, and what is told when it does not work out."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.winrm import WinrmConfig, WinrmLink, WinrmServerDown
from tests.unit.far_ends import command_line, until

pytest.importorskip("winrm")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from winrm.exceptions import WSManFaultError

from pytest_kdriver.guest.links import wsman as sessions
from tests.unit.wsman_server import HOST, PASSWORD, USER, WsmanServer

ECHO = "cat"
ALL_BYTES = bytes(range(256))
MANY = ALL_BYTES * (1 << 12)  # 1 MiB: more than an envelope holds
DEAF = "import os, signal; signal.alarm(60); os.write(1, b'%d' % os.getpid()); signal.pause()"
ECHO_BASE64 = """
import base64, sys
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(base64.b64encode(base64.b64decode(line.rstrip(), validate=True)) + b"\\r\\n")
    sys.stdout.buffer.flush()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WsmanServer]:
    with WsmanServer(tmp_path_factory.mktemp("winrm") / "wsman", "--basic-over-http") as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def receive(link: WinrmLink, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := link.receive()):
        data += more
    return data


def works(config: WinrmConfig, data: bytes = ALL_BYTES) -> bool:
    with closing(WinrmLink(config, ECHO, timeout=20)) as link:
        link.send(data, 10)
        return receive(link, len(data)) == data


def refused(config: WinrmConfig, *, command: str = ECHO) -> str:
    """What is told where there is no link."""
    with pytest.raises(LinkError) as caught:
        WinrmLink(config, command, timeout=20)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert not config.password or config.password not in "".join(shown.format())
    return str(caught.value)


class TestWeAreLetIn:
    @pytest.mark.parametrize(
        "way",
        [
            {},
            {"https": False},
            {"basic": True},
            {"https": False, "basic": True, "allow_basic_over_http": True},
        ],
        ids=["NTLM over HTTPS", "NTLM over HTTP", "Basic over HTTPS", "Basic over HTTP"],
    )
    def test_each_way(self, server: WsmanServer, way: dict[str, bool]) -> None:
        assert works(server.config(**way), MANY)

    def test_basic_over_http_only_where_it_is_wanted(self, server: WsmanServer) -> None:
        told = refused(server.config(https=False, basic=True))
        assert "would show the password to the network: use HTTPS, or NTLM" in told

    def test_what_ntlm_sends_over_http_can_not_be_read(self, server: WsmanServer) -> None:
        with Relay(server.http_port) as relay:
            assert works(server.config(https=False, port=relay.port), b"plain text")
            seen = relay.seen()
        assert b"HTTP-SPNEGO-session-encrypted" in seen
        assert b"Envelope>" not in seen

    @pytest.mark.parametrize("way", [{}, {"https": False}, {"basic": True}])
    def test_a_wrong_password_is_told_and_not_repeated(
        self, server: WsmanServer, way: dict[str, bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        told = refused(server.config(password="open-sesame-1", **way))
        assert f"did not let us in: it refused the user {USER} (401)" in told
        assert ("Basic" if way.get("basic") else "LocalAccountTokenFilterPolicy") in told
        assert "open-sesame" not in told + caplog.text

    def test_no_password_is_told_before_anything_is_sent(self) -> None:
        told = refused(WinrmConfig(host="nowhere.invalid", user="me", password=""), command="x" * 9)
        assert "needs a user and a password" in told

    def test_the_password_is_shown_nowhere(
        self, server: WsmanServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        assert PASSWORD not in repr(server.config())
        assert works(server.config())
        assert PASSWORD not in caplog.text

    def test_no_proxy_of_the_environment_s_is_used(
        self, server: WsmanServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert works(server.config())
        assert works(server.config(https=False))

    def test_anew_where_the_connection_was_silent(
        self, server: WsmanServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sessions, "_IDLE", -1.0)
        for https in (True, False):
            with closing(WinrmLink(server.config(https=https), ECHO, timeout=20)) as link:
                for byte in b"abc":
                    link.send(bytes([byte]), 10)
                    assert link.receive() == bytes([byte])


class TestTheServer:
    def test_with_a_certificate_of_an_unknown_is_told(self, server: WsmanServer) -> None:
        told = refused(server.config(ca=None))
        assert "its certificate is not accepted: self-signed certificate; name the file" in told

    def test_s_ca_file_that_is_missing_is_told(self, server: WsmanServer, tmp_path: Path) -> None:
        assert "nowhere.pem is not there" in refused(server.config(ca=tmp_path / "nowhere.pem"))

    @pytest.mark.parametrize(
        ("days", "name", "expected"),
        [
            ((-9, -1), "127.0.0.1", "certificate has expired; make it a new one, or set the clock"),
            ((1, 9), "127.0.0.1", "certificate is not yet valid; is the clock of this machine or"),
            (
                (-1, 9),
                "127.0.0.2",
                "; reach it by a name that the certificate has, not as 127.0.0.1",
            ),
        ],
        ids=["expired", "not yet valid", "of another name"],
    )
    def test_with_a_certificate_that_is_no_good_is_told(
        self, tmp_path: Path, days: tuple[int, int], name: str, expected: str
    ) -> None:
        certificate = certificate_for(tmp_path, name, days)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        with Server(lambda _: b"", context) as server:
            told = refused(server.config(https=True, ca=certificate))
        assert expected in told

    def test_that_speaks_no_tls_is_told(self, server: WsmanServer) -> None:
        told = refused(server.config(port=server.http_port))
        assert "TLS did not work out" in told or "the connection was lost" in told

    def test_that_does_not_listen_is_told(self, server: WsmanServer) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            config = server.config(port=free.getsockname()[1])
            with pytest.raises(WinrmServerDown) as caught:
                WinrmLink(config, ECHO, timeout=20)
        assert "the connection was refused; does WinRM run there" in str(caught.value)

    def test_that_says_no_is_none_that_is_on_its_way_up(self, server: WsmanServer) -> None:
        with pytest.raises(LinkError) as caught:
            WinrmLink(server.config(ca=None), ECHO, timeout=20)
        assert not isinstance(caught.value, WinrmServerDown)

    def test_that_hangs_up_at_once_may_be(self) -> None:
        with Server(lambda _: b"") as server:
            server.hang_up = True
            with pytest.raises(WinrmServerDown, match="the connection was lost: "):
                WinrmLink(server.config(), ECHO, timeout=20)

    def test_whose_name_is_unknown_is_told(self, server: WsmanServer) -> None:
        told = refused(server.config(host="nowhere.invalid"))
        assert "WinRM server nowhere.invalid:" in told
        assert "its name can't be resolved" in told

    def test_that_is_silent_is_given_up(self, pool: ThreadPoolExecutor) -> None:
        with Server(lambda _: None) as server:
            start = time.monotonic()
            with pytest.raises(TimeoutError, match="did not let us in within 0.5 s"):
                WinrmLink(server.config(), ECHO, timeout=0.5)
            assert time.monotonic() - start < 5

    def test_that_takes_no_connection_is_told_with_what_may_keep_it_from_it(
        self, server: WsmanServer
    ) -> None:
        with ExitStack() as stack, socket.socket() as full:
            full.bind((HOST, 0))
            full.listen(0)
            for _ in range(3):  # there is room for no more to wait
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            with pytest.raises(TimeoutError) as caught:
                WinrmLink(server.config(port=full.getsockname()[1]), ECHO, timeout=0.5)
        assert "did not take the connection within 0.5 s: is the machine up" in str(caught.value)
        assert "profile is Public" in str(caught.value)

    def test_that_asks_nobody_who_he_is_is_told(self) -> None:
        with Server(lambda _: http(200, "hello")) as server:
            told = refused(server.config(basic=False))
        assert "it did not ask who we are" in told

    def test_that_answers_in_plain_text_what_was_encrypted_is_not_believed(
        self, server: WsmanServer
    ) -> None:
        with Relay(
            server.http_port, change=(b"multipart/encrypted", b"multipart/plain----")
        ) as relay:
            told = refused(server.config(https=False, port=relay.port))
        assert "its answer is not encrypted, though what it was asked is" in told

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 X\r\nContent-Length: 9999999999\r\n\r\n",
            b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"10000\r\n%b\r\n" % (b" " * 0x10000) * 20,
        ],
    )
    def test_that_says_too_much_is_not_listened_to(self, answer: bytes) -> None:
        with Server(lambda _: answer) as server:
            assert re.search(r"its answer has (more than )?\d+ bytes", refused(server.config()))

    def test_that_sends_us_elsewhere_is_not_followed(self) -> None:
        answer = b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
        with Server(lambda _: answer) as server:
            assert "it sends us elsewhere" in refused(server.config())

    def test_may_answer_in_pieces(self) -> None:
        body = fault(5, "No.").encode()
        answer = b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
        with Server(lambda _: answer % (len(body), body)) as server:
            assert "No. (0x00000005)" in refused(server.config())

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ((200, "<html><body>Please log in.<br></body></html>"), "its answer is no SOAP"),
            ((200, "hello"), "its answer is no SOAP"),
            ((200, "<a/>"), "its answer makes no sense"),
            (
                (502, "<!DOCTYPE html><html>Bad gateway</html>"),
                "502 and a page; a proxy or another",
            ),
            ((404, ""), "status 404: nothing is at 127.0.0.1:"),
            ((503, "busy\x1b[2J"), r"status 503: busy\x1b[2J"),
        ],
    )
    def test_that_is_none_is_told(self, answer: tuple[int, str], expected: str) -> None:
        with Server(lambda _: http(*answer)) as server:
            assert expected in refused(server.config())

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (0x803381A5, "Too many. (0x803381A5): a quota of its is used up; end other shells"),
            (5, "Too many. (0x00000005): the user is no administrator there, or one whose rights"),
            (0x80338113, "did not open a shell: Too many. (0x80338113)"),
        ],
    )
    def test_that_opens_no_shell_says_why(self, code: int, expected: str) -> None:
        with Server(lambda _: http(500, fault(code, "Too many."))) as server:
            assert expected in refused(server.config())

    def test_that_has_as_many_shells_as_it_may_have_says_so(self, tmp_path: Path) -> None:
        with (
            WsmanServer(tmp_path / "wsman") as server,
            closing(sessions.Session(server.config()).within(10)) as session,
        ):
            with contextlib.suppress(WSManFaultError):
                for _ in range(100):
                    session.open()
            told = refused(server.config())
        assert "did not open a shell: " in told
        assert "a quota of its is used up; end other shells" in told

    def test_may_allow_small_envelopes_only(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path / "wsman", "--max-envelope-kb", "64") as server:
            assert works(server.config(), MANY)


class TestTheBytes:
    def test_are_those_that_came_where_the_server_changes_them(self, tmp_path: Path) -> None:
        """The link does not know; who made it asks for lines of base64."""
        with WsmanServer(tmp_path / "wsman", "--mangle") as server:
            with closing(WinrmLink(server.config(), ECHO, timeout=20)) as link:
                link.send(b"a\xff", 10)
                assert receive(link, 2) == b"a?"
            command = command_line(ECHO_BASE64)
            with closing(WinrmLink(server.config(), command, timeout=20, base64=True)) as link:
                link.send(MANY, 20)
                assert receive(link, len(MANY)) == MANY

    @pytest.mark.parametrize("line", ["%%%%", "YQ", "Y"])
    def test_that_are_no_base64_end_the_stream(self, server: WsmanServer, line: str) -> None:
        command = f"echo {line}; cat"
        with closing(WinrmLink(server.config(), command, timeout=20, base64=True)) as link:
            assert link.receive() == b""
            assert link.ended is not None
            assert link.ended.startswith("it sends a line that is no base64")


class TestTheEnd:
    def test_of_a_command_that_is_not_there_says_so(self, server: WsmanServer) -> None:
        with closing(WinrmLink(server.config(), "no-such-agent", timeout=20)) as link:
            assert link.receive() == b""
            assert link.ended is not None
            assert link.ended.startswith("it ended with exit code 127 and said: ")
            assert "no-such-agent" in link.ended
            with pytest.raises(LinkError, match="the agent is gone: it ended with exit code 127"):
                link.send(b"x", 1)

    def test_is_told_at_once_when_the_server_is_killed(
        self, tmp_path: Path, pool: ThreadPoolExecutor
    ) -> None:
        with WsmanServer(tmp_path / "wsman") as server:
            link = WinrmLink(server.config(), command_line(DEAF), timeout=20)
            far_end = int(link.receive())
            waiting = pool.submit(link.receive)
            server.kill()
            assert waiting.result(10) == b""
            assert link.ended is not None
            assert "the connection was lost" in link.ended
            with pytest.raises(LinkError, match="the agent is gone: the connection was lost"):
                link.send(b"x", 1)
            link.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(far_end, signal.SIGKILL)

    def test_is_where_an_answer_breaks_off_for_what_is_lost_can_not_be_asked_for_again(
        self, server: WsmanServer, pool: ThreadPoolExecutor
    ) -> None:
        config = server.config(https=False, basic=True, allow_basic_over_http=True)
        with Relay(server.http_port, cut_at=b"<rsp:ReceiveResponse") as relay:
            link = WinrmLink(
                WinrmConfig(
                    host=HOST, port=relay.port, user=USER, password=config.password,
                    https=False, basic=True, allow_basic_over_http=True,
                ),
                ECHO, timeout=20, close_timeout=0.2,
            )  # fmt: skip
            link.send(b"x" * 1000, 10)
            assert link.receive() == b""
            assert link.receive() == b""
            assert link.ended is not None
            assert "the connection was lost" in link.ended
            with pytest.raises(LinkError, match="gone"):
                link.send(b"x", 1)
            link.close()

    def test_is_where_nobody_knows_what_became_of_what_was_sent(
        self, server: WsmanServer, pool: ThreadPoolExecutor
    ) -> None:
        with Relay(server.http_port, cut_at=b"<rsp:SendResponse") as relay:
            config = server.config(
                https=False, basic=True, allow_basic_over_http=True, port=relay.port
            )
            link = WinrmLink(config, "cat >/dev/null", timeout=20, close_timeout=0.2)
            waiting = pool.submit(link.receive)
            link.send(b"x", 10)
            assert waiting.result(10) == b""
            assert link.ended is not None
            assert link.ended.startswith("what was sent is lost: the connection was lost")
            link.close()

    def test_keeps_the_last_words_of_an_agent_whose_input_is_gone(
        self, server: WsmanServer, pool: ThreadPoolExecutor
    ) -> None:
        command = "exec 0<&-; sleep 0.3; echo bye; echo sorry >&2; exit 3"
        with closing(WinrmLink(server.config(), command, timeout=20)) as link:
            with contextlib.suppress(LinkError):
                for _ in range(50):
                    link.send(b"x", 1)
                    time.sleep(0.002)
            assert b"".join(iter(link.receive, b"")) == b"bye\n"
            assert link.ended == "it ended with exit code 3 and said: sorry"

    def test_comes_behind_what_was_sent(self, server: WsmanServer, tmp_path: Path) -> None:
        got = tmp_path / "got"
        link = WinrmLink(server.config(), f"cat >{got}", timeout=20)
        link.send(MANY, 20)
        link.close()
        assert got.read_bytes() == MANY

    def test_ends_an_agent_that_stays(self, server: WsmanServer) -> None:
        link = WinrmLink(server.config(), command_line(DEAF), timeout=20, close_timeout=0.5)
        far_end = int(link.receive())
        link.close()
        until(lambda: not Path(f"/proc/{far_end}").exists())

    def test_comes_in_time_where_the_server_no_longer_answers(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path / "wsman") as server, ExitStack() as last:
            before = set(threading.enumerate())
            link = WinrmLink(server.config(), ECHO, timeout=20, close_timeout=0.5)
            link.send(b"x", 1)
            assert link.receive() == b"x"
            server.process.send_signal(signal.SIGSTOP)
            last.callback(server.process.send_signal, signal.SIGCONT)
            link.send(b"x", 1)
            start = time.monotonic()
            link.close()
            assert time.monotonic() - start < 2
            assert set(threading.enumerate()) == before


def certificate_for(folder: Path, address: str, days: tuple[int, int]) -> Path:
    """A certificate that signs itself, with its key in the same file."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def http(status: int, body: str) -> bytes:
    data = body.encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def fault(code: int, reason: str) -> str:
    soap = "http://www.w3.org/2003/05/soap-envelope"
    detail = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
    return (
        f'<s:Envelope xmlns:s="{soap}"><s:Body><s:Fault><s:Code><s:Value>s:Receiver</s:Value></s:Code>'
        f"<s:Reason><s:Text>{reason}</s:Text></s:Reason>"
        f'<s:Detail><f:WSManFault xmlns:f="{detail}" Code="{code}"/></s:Detail>'
        "</s:Fault></s:Body></s:Envelope>"
    )


class Connections:
    """Something that listens, with a thread for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._stack = ExitStack()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            self.serve(connection)

    def serve(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()
        self._listener.close()


class Server(Connections):
    """Answers each request with what it is told; None is silence."""

    def __init__(
        self, answer: Callable[[bytes], bytes | None], tls: ssl.SSLContext | None = None
    ) -> None:
        self._answer = answer
        self._tls = tls
        self.hang_up = False
        super().__init__()

    def __enter__(self) -> Server:
        return self

    def config(self, **changes: object) -> WinrmConfig:
        values: dict[str, object] = {
            "host": HOST,
            "port": self.port,
            "user": USER,
            "password": PASSWORD,
            "https": False,
            "basic": True,
            "allow_basic_over_http": True,
        }
        return WinrmConfig(**(values | changes))  # type: ignore[arg-type]

    def serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            with self._tls.wrap_socket(connection, server_side=True):
                return
        while not self.hang_up and (head := self._read(connection, b"")):
            head, _, body = head.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(65536)
            answer = self._answer(body)
            if answer is not None:
                connection.sendall(answer)

    @staticmethod
    def _read(connection: socket.socket, data: bytes) -> bytes:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return b""
            data += more
        return data


class Relay(Connections):
    """Between a client and a server. Hangs up in an answer, behind ``cut_at``, and changes answers."""

    def __init__(
        self, port: int, *, cut_at: bytes | None = None, change: tuple[bytes, bytes] = (b"", b"")
    ) -> None:
        self._to = port
        self._cut_at = cut_at
        self._change = change
        self._seen: list[bytes] = []
        super().__init__()

    def __enter__(self) -> Relay:
        return self

    def seen(self) -> bytes:
        return b"".join(self._seen)

    def serve(self, connection: socket.socket) -> None:
        with socket.create_connection((HOST, self._to)) as server:
            there = threading.Thread(target=self._copy, args=(connection, server, bytes))
            there.start()
            self._copy(server, connection, self._edit)
            there.join()

    def _edit(self, answer: bytes) -> bytes:
        if self._cut_at is not None and self._cut_at in answer:
            return answer[: answer.index(self._cut_at) + len(self._cut_at)]
        return answer.replace(*self._change) if self._change[0] else answer

    def _copy(
        self, source: socket.socket, to: socket.socket, edit: Callable[[bytes], bytes]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._seen.append(data)
                edited = edit(data)
                to.sendall(edited)
                if len(edited) < len(data):
                    break
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_without_pywinrm_it_is_told_what_to_install(
    server: WsmanServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pytest_kdriver.guest.links.wsman")
    from pytest_kdriver.guest import links

    monkeypatch.delattr(links, "wsman")
    for name in [name for name in sys.modules if name.partition(".")[0] == "winrm"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'pytest-kdriver[winrm]'" in refused(server.config())


def test_the_module_is_imported_without_pywinrm() -> None:
    script = "import pytest_kdriver.guest.links.winrm, sys; sys.exit('winrm' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
