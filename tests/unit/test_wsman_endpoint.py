"""The WS-Management endpoint, asked by clients that were made for Windows, and by hand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import random
import shlex
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import spnego
import winrm
from pypsrp.encryption import WinRMEncryption
from pypsrp.exceptions import AuthenticationError, WinRMTransportError, WSManFaultError
from pypsrp.shell import CommandState, Process, SignalCode, WinRS
from pypsrp.wsman import WSMan
from winrm.exceptions import InvalidCredentialsError

from tests.unit.far_ends import command_line, until
from tests.unit.wsman_server import HOST, PASSWORD, PROGRAM, USER, WsmanServer

TIMED_OUT = 2150858793
SHELL_NOT_FOUND = 2150858843
PIPE_ENDED = 2147942509

SOAP = "http://www.w3.org/2003/05/soap-envelope"
SHELL = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
TRANSFER = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
IDENTITY = "http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd"
IDENTIFY = (
    f'<s:Envelope xmlns:s="{SOAP}" xmlns:wsmid="{IDENTITY}"><s:Header/>'
    "<s:Body><wsmid:Identify/></s:Body></s:Envelope>"
)


ANYBODY = {"WSMANIDENTIFY": "unauthenticated"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WsmanServer]:
    with WsmanServer(tmp_path_factory.mktemp("wsman")) as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def session(server: WsmanServer, transport: str, *, https: bool, **changes: Any) -> winrm.Session:
    url = f"https://{HOST}:{server.https_port}" if https else f"http://{HOST}:{server.http_port}"
    trust = {"ca_trust_path": str(server.certificate)}
    return winrm.Session(
        f"{url}/wsman", auth=(USER, PASSWORD), transport=transport, **(trust | changes)
    )


def client(server: WsmanServer, *, https: bool = False, **changes: Any) -> WSMan:
    where: dict[str, Any] = {"ssl": https, "port": server.https_port if https else server.http_port}
    if https:
        where["cert_validation"] = str(server.certificate)
    return WSMan(
        HOST, **({"username": USER, "password": PASSWORD, "auth": "negotiate"} | where | changes)
    )


@contextlib.contextmanager
def shell(server: WsmanServer, **changes: Any) -> Iterator[WinRS]:
    with client(server, **changes) as wsman, WinRS(wsman) as opened:
        yield opened


def run(opened: WinRS, line: str, given: bytes | None = None, *, chunk: int = 100_000) -> Process:
    """A command from its start to its end."""
    process = Process(opened, line)
    process.begin_invoke()
    if given is not None:
        for at in range(0, len(given), chunk):
            process.send(given[at : at + chunk], end=at + chunk >= len(given))
    process.end_invoke()
    process.signal(SignalCode.TERMINATE)
    return process


def polled(process: Process) -> Process:
    process.poll_invoke()
    return process


def alive(pid: int) -> bool:
    """A zombie is not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


class TestPywinrm:
    @pytest.mark.parametrize(
        ("transport", "https"), [("ntlm", False), ("ntlm", True), ("basic", True)]
    )
    def test_runs_a_command(self, server: WsmanServer, transport: str, https: bool) -> None:
        answer = session(server, transport, https=https).run_cmd(
            "echo out; echo error >&2; exit", ["7"]
        )
        assert (answer.status_code, answer.std_out, answer.std_err) == (7, b"out\n", b"error\n")

    def test_seals_what_goes_over_http(self, server: WsmanServer) -> None:
        asked = session(server, "ntlm", https=False)
        assert asked.run_cmd("true").status_code == 0
        assert asked.protocol.transport.encryption is not None

    def test_may_not_go_unsealed_over_http(self, server: WsmanServer) -> None:
        with pytest.raises(Exception, match="Code 500"):
            session(server, "ntlm", https=False, message_encryption="never").run_cmd("true")

    @pytest.mark.parametrize(
        ("transport", "https"), [("ntlm", False), ("ntlm", True), ("basic", True), ("basic", False)]
    )
    @pytest.mark.parametrize(
        "auth", [(USER, "wrong"), ("nobody", PASSWORD), ("other", PASSWORD), (USER, "")]
    )
    def test_with_a_wrong_password_stays_outside(
        self, server: WsmanServer, transport: str, https: bool, auth: tuple[str, str]
    ) -> None:
        asked = session(server, transport, https=https)
        asked.protocol.transport.username, asked.protocol.transport.password = auth
        with pytest.raises(InvalidCredentialsError, match="rejected"):
            asked.run_cmd("true")

    def test_may_not_send_a_password_over_http(self, server: WsmanServer) -> None:
        with pytest.raises(InvalidCredentialsError):
            session(server, "basic", https=False).run_cmd("true")

    def test_may_where_the_server_allows_it(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path, "--basic-over-http") as server:
            assert session(server, "basic", https=False).run_cmd("echo x").std_out == b"x\n"

    def test_waits_for_a_command_that_is_silent_for_longer_than_a_request(
        self, server: WsmanServer
    ) -> None:
        asked = session(server, "ntlm", https=False, operation_timeout_sec=1, read_timeout_sec=20)
        assert asked.run_cmd("sleep 2.5; echo done").std_out == b"done\n"


class TestPypsrp:
    @pytest.mark.parametrize("auth", ["negotiate", "ntlm"])
    @pytest.mark.parametrize("https", [False, True])
    def test_sends_and_receives_megabytes(
        self, server: WsmanServer, auth: str, https: bool
    ) -> None:
        data = random.Random(1).randbytes(5_000_000)
        with shell(server, https=https, auth=auth) as opened:
            process = run(opened, "sha256sum; cat /proc/self/stat | wc -l >&2", data)
            digest = hashlib.sha256(data).hexdigest().encode()
            assert (process.rc, process.stdout, process.stderr) == (0, digest + b"  -\n", b"1\n")

            made = "import random, os; os.write(2, b'e' * 300_000)"
            made += "; import sys; sys.stdout.buffer.write(random.Random(1).randbytes(5_000_000))"
            process = run(opened, command_line(made))
            assert (process.rc, process.stdout == data) == (0, True)
            assert process.stderr == b"e" * 300_000

    def test_keeps_every_byte(self, server: WsmanServer) -> None:
        with shell(server) as opened:
            assert run(opened, "cat", bytes(range(256)) * 3).stdout == bytes(range(256)) * 3

    def test_has_two_shells_at_once(self, server: WsmanServer, pool: ThreadPoolExecutor) -> None:
        def count(letter: bytes) -> bytes:
            with shell(server) as opened:
                return bytes(run(opened, "cat", letter * 1_000_000).stdout)

        assert list(pool.map(count, [b"a", b"b"])) == [b"a" * 1_000_000, b"b" * 1_000_000]

    def test_ends_a_command_and_all_that_it_started(self, server: WsmanServer) -> None:
        with shell(server) as opened:
            process = Process(opened, "sleep 1000 & echo $$ $!; wait")
            process.begin_invoke()
            until(lambda: polled(process).stdout)
            pids = [int(pid) for pid in process.stdout.split()]
            assert [alive(pid) for pid in pids] == [True, True]
            process.signal(SignalCode.TERMINATE)
            until(lambda: not any(alive(pid) for pid in pids))

    @pytest.mark.parametrize("ignore", ["", "trap '' INT; "])
    def test_interrupts_a_command_and_hears_its_end(self, server: WsmanServer, ignore: str) -> None:
        with shell(server) as opened:
            process = Process(opened, f"{ignore}sleep 1000 & echo $!; wait; exit 3")
            process.begin_invoke()
            until(lambda: polled(process).stdout)
            process.signal(SignalCode.CTRL_C)
            until(lambda: polled(process).state == CommandState.DONE)
            assert process.rc == (128 + 9 if ignore else 128 + 2)
            until(lambda: not alive(int(process.stdout)))

    def test_closes_a_shell_and_what_runs_in_it(self, server: WsmanServer) -> None:
        with client(server) as wsman:
            opened = WinRS(wsman)
            opened.open()
            process = Process(opened, "echo $$; exec sleep 1000")
            process.begin_invoke()
            until(lambda: polled(process).stdout)
            opened.close()
            until(lambda: not alive(int(process.stdout)))

    def test_hears_that_a_shell_is_not_there(self, server: WsmanServer) -> None:
        with client(server) as wsman, WinRS(wsman) as opened:
            selectors = opened._selector_set
            opened.close()
            opened._selector_set = selectors
            with pytest.raises(WSManFaultError) as caught:
                Process(opened, "true").begin_invoke()
            assert caught.value.code == SHELL_NOT_FOUND

    def test_does_not_see_the_shell_of_another(self, server: WsmanServer) -> None:
        with (
            shell(server) as opened,
            client(server, username="other", password="other-secret-2") as wsman,
        ):
            stolen = WinRS(wsman)
            stolen._selector_set = opened._selector_set
            with pytest.raises(WSManFaultError) as caught:
                Process(stolen, "true").begin_invoke()
            assert caught.value.code == SHELL_NOT_FOUND

    def test_hears_that_the_program_it_sends_to_has_ended(self, server: WsmanServer) -> None:
        with shell(server) as opened:
            process = Process(opened, "true")
            process.invoke()
            with pytest.raises(WSManFaultError) as caught:
                process.send(b"x", end=False)
            assert caught.value.code == PIPE_ENDED

    def test_may_end_what_it_sends_once(self, server: WsmanServer) -> None:
        with shell(server) as opened:
            process = Process(opened, "cat; sleep 1000")
            process.begin_invoke()
            process.send(b"x", end=True)
            with pytest.raises(WSManFaultError) as caught:
                process.send(b"y", end=False)
            assert caught.value.code == PIPE_ENDED
            assert polled(process).stdout == b"x"

    def test_hears_that_what_it_waits_for_was_ended(
        self, server: WsmanServer, pool: ThreadPoolExecutor
    ) -> None:
        with shell(server) as opened, client(server) as wsman:
            process = Process(opened, "echo x; exec sleep 1000")
            process.begin_invoke()
            until(lambda: polled(process).stdout)
            waiting = pool.submit(process.poll_invoke)
            other = WinRS(wsman)
            other._selector_set = opened._selector_set
            other.signal(SignalCode.TERMINATE, process.id or "")
            with pytest.raises(WSManFaultError) as caught:
                waiting.result(10)
            assert caught.value.code in {995, 87}  # or it came too late

    def test_waits_for_a_command_that_is_silent_for_longer_than_a_request(
        self, server: WsmanServer
    ) -> None:
        with shell(server, operation_timeout=1) as opened:
            assert run(opened, "sleep 1.5; echo done").stdout == b"done\n"

    def test_with_a_wrong_password_stays_outside(self, server: WsmanServer) -> None:
        for https in (False, True):
            with (
                pytest.raises(AuthenticationError),
                shell(server, https=https, password="wrong"),
            ):
                pass

    def test_may_not_go_unsealed_over_http(self, server: WsmanServer) -> None:
        with pytest.raises(WinRMTransportError) as caught, shell(server, encryption="never"):
            pass
        assert caught.value.code == 500

    def test_needs_the_channel_binding_over_https(self, server: WsmanServer) -> None:
        with (
            pytest.raises(AuthenticationError),
            shell(server, https=True, negotiate_send_cbt=False),
        ):
            pass

    def test_gives_the_shell_its_environment_and_folder(
        self, server: WsmanServer, tmp_path: Path
    ) -> None:
        with (
            client(server) as wsman,
            WinRS(wsman, environment={"KD": "<&>"}, working_directory=str(tmp_path)) as opened,
        ):
            process = run(opened, 'echo "$KD"; pwd; env | grep -c NTLM')
            assert process.stdout.decode().split() == ["<&>", str(tmp_path), "0"]

    def test_asks_how_large_an_envelope_may_be(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path, "--max-envelope-kb", "64") as server:
            wsman = client(server)
            wsman.update_max_payload_size()
            assert wsman.max_envelope_size == 65536
            with wsman, WinRS(wsman) as opened:
                data = b"x" * wsman.max_payload_size * 3
                assert run(opened, "cat", data, chunk=wsman.max_payload_size).stdout == data


def test_a_code_page_takes_what_is_not_ascii(tmp_path: Path) -> None:
    with WsmanServer(tmp_path, "--mangle") as server, shell(server) as opened:
        process = run(opened, "tee /dev/stderr", bytes(range(256)))
        assert process.stdout == bytes(range(128)) + b"?" * 128
        assert process.stderr == bytes(range(256))


class TestFlow:
    def test_output_comes_at_once(
        self, server: WsmanServer, pool: ThreadPoolExecutor, tmp_path: Path
    ) -> None:
        with shell(server) as opened:
            go = shlex.quote(str(tmp_path / "go"))
            process = Process(
                opened, f"until [ -e {go} ]; do sleep 0.02; done; echo x; exec sleep 100"
            )
            process.begin_invoke()
            waiting = pool.submit(process.poll_invoke)
            (tmp_path / "go").touch()
            began = time.monotonic()
            waiting.result(10)
            assert process.stdout == b"x\n"
            assert time.monotonic() - began < 5

    def test_a_program_that_nobody_reads_stops(self, server: WsmanServer, tmp_path: Path) -> None:
        written = tmp_path / "written"
        script = f"""
import os, pathlib
os.set_blocking(1, False)
count = 0
try:
    while True:
        count += os.write(1, bytes(4096))
except BlockingIOError:
    pathlib.Path({str(written)!r}).write_text(str(count))
"""
        with shell(server) as opened:
            process = Process(opened, command_line(script))
            process.begin_invoke()
            count = int(until(lambda: written.exists() and written.read_text()))
            assert count <= 1 << 20
            process.end_invoke()
            assert len(process.stdout) == count

    def test_a_send_waits_for_a_program_that_does_not_read(
        self, server: WsmanServer, tmp_path: Path
    ) -> None:
        go = shlex.quote(str(tmp_path / "go"))
        chunk = b"x" * 60_000
        with shell(server, operation_timeout=1) as opened:
            process = Process(opened, f"until [ -e {go} ]; do sleep 0.02; done; wc -c")
            process.begin_invoke()
            sent = 0
            with pytest.raises(WSManFaultError) as caught:  # noqa: PT012
                while sent < 100:
                    process.send(chunk, end=False)
                    sent += 1
            assert caught.value.code == TIMED_OUT
            assert sent * len(chunk) < 300_000
            (tmp_path / "go").touch()
            process.send(chunk, end=True)  # nothing of the one that was refused is there
            process.end_invoke()
            assert int(process.stdout) == (sent + 1) * len(chunk)

    def test_the_end_ends_all_that_was_started(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path) as server:
            wsman = client(server)
            opened = WinRS(wsman)
            opened.open()
            process = Process(opened, "sleep 1000 & echo $$ $!; wait")
            process.begin_invoke()
            until(lambda: polled(process).stdout)
            server.close()
            assert server.process.returncode == 0
            assert not any(alive(int(pid)) for pid in process.stdout.split())
            wsman.close()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def fault(self) -> tuple[str, str]:
        """Its subcode, and Windows's number."""
        root = ElementTree.fromstring(self.body)
        code = root.find(".//{http://schemas.microsoft.com/wbem/wsman/1/wsmanfault}WSManFault")
        assert code is not None
        return root.findtext(f".//{{{SOAP}}}Subcode/{{{SOAP}}}Value", ""), code.attrib["Code"]


@contextlib.contextmanager
def connection(server: WsmanServer, *, https: bool) -> Iterator[http.client.HTTPConnection]:
    trust = ssl.create_default_context(cafile=str(server.certificate))
    opened = (
        http.client.HTTPSConnection(HOST, server.https_port, timeout=30, context=trust)
        if https
        else http.client.HTTPConnection(HOST, server.http_port, timeout=30)
    )
    with contextlib.closing(opened):
        yield opened


def post(
    server: WsmanServer,
    body: str | bytes,
    *,
    https: bool = True,
    basic: bool = True,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    more = dict(headers or {})
    if basic:
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        more["Authorization"] = f"Basic {token}"
    with connection(server, https=https) as opened:
        opened.request("POST", "/wsman", body.encode() if isinstance(body, str) else body, more)
        response = opened.getresponse()
        return Answer(response.status, response.headers, response.read())


def envelope(
    action: str,
    body: str = "",
    *,
    shell: str = "",
    resource: str = f"{SHELL}/cmd",
    timeout: str = "PT20S",
    size: int = 153600,
) -> str:
    return (
        f'<s:Envelope xmlns:s="{SOAP}" xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing"'
        f' xmlns:w="http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd" xmlns:rsp="{SHELL}"><s:Header>'
        f"<a:Action>{action}</a:Action><a:MessageID>uuid:{uuid.uuid4()}</a:MessageID>"
        f"<w:ResourceURI>{resource}</w:ResourceURI><w:OperationTimeout>{timeout}</w:OperationTimeout>"
        f"<w:MaxEnvelopeSize>{size}</w:MaxEnvelopeSize>"
        f'<w:SelectorSet><w:Selector Name="ShellId">{shell}</w:Selector></w:SelectorSet>'
        f"</s:Header><s:Body>{body}</s:Body></s:Envelope>"
    )


@pytest.fixture
def begin(server: WsmanServer) -> Iterator[Callable[[str], tuple[str, str]]]:
    """Start a command by hand; its shell and its name come back."""
    opened = []

    def start(line: str) -> tuple[str, str]:
        created = post(server, envelope(f"{TRANSFER}/Create", "<rsp:Shell/>"))
        name = ElementTree.fromstring(created.body).findtext(f".//{{{SHELL}}}ShellId", "")
        opened.append(name)
        command = f"<rsp:CommandLine><rsp:Command>{line}</rsp:Command></rsp:CommandLine>"
        answer = post(server, envelope(f"{SHELL}/Command", command, shell=name))
        root = ElementTree.fromstring(answer.body)
        return name, root.findtext(f".//{{{SHELL}}}CommandId", "")

    yield start
    for name in opened:
        assert post(server, envelope(f"{TRANSFER}/Delete", shell=name)).status == 200


def receive(shell: str, command: str, **changes: Any) -> str:
    body = (
        f'<rsp:Receive><rsp:DesiredStream CommandId="{command}">stdout stderr</rsp:DesiredStream>'
        "</rsp:Receive>"
    )
    return envelope(f"{SHELL}/Receive", body, shell=shell, **changes)


class TestByHand:
    def test_who_says_nothing_is_told_how_to_come_in(self, server: WsmanServer) -> None:
        for https, schemes in (
            (False, ["Negotiate"]),
            (True, ["Negotiate", 'Basic realm="WSMAN"']),
        ):
            answer = post(server, "", https=https, basic=False)
            assert answer.status == 401
            assert answer.headers.get_all("WWW-Authenticate") == schemes

    @pytest.mark.parametrize("https", [False, True])
    def test_it_says_what_it_is_to_anybody(self, server: WsmanServer, https: bool) -> None:
        answer = post(server, IDENTIFY, https=https, basic=False, headers=ANYBODY)
        assert answer.status == 200
        root = ElementTree.fromstring(answer.body)
        assert root.findtext(f".//{{{IDENTITY}}}ProtocolVersion", "").endswith("/wsman.xsd")

    def test_and_nothing_else(self, server: WsmanServer) -> None:
        create = envelope(f"{TRANSFER}/Create", "<rsp:Shell/>")
        assert post(server, create, basic=False, headers=ANYBODY).status == 401
        assert post(server, IDENTIFY, basic=False).status == 401
        assert post(server, IDENTIFY).status == 200

    def test_many_requests_go_over_one_connection(self, server: WsmanServer) -> None:
        with connection(server, https=False) as opened:
            opened.connect()
            socket = opened.sock
            for _ in range(3):
                opened.request("POST", "/wsman", IDENTIFY, ANYBODY)
                assert opened.getresponse().read()
            assert opened.sock is socket

    @pytest.mark.parametrize("size", [8192, 20_000])
    def test_an_answer_is_as_large_as_may_be_and_no_larger(
        self, server: WsmanServer, begin: Callable[[str], tuple[str, str]], size: int
    ) -> None:
        shell, command = begin("head -c 100000 /dev/zero &gt;&amp;2; head -c 100000 /dev/zero")
        until(
            lambda: size - 100 < len(post(server, receive(shell, command, size=size)).body) <= size
        )

    def test_nothing_to_receive_is_told_in_time(
        self, server: WsmanServer, begin: Callable[[str], tuple[str, str]]
    ) -> None:
        began = time.monotonic()
        answer = post(server, receive(*begin("exec sleep 1000"), timeout="PT0.3S"))
        assert (answer.status, *answer.fault) == (500, "w:TimedOut", str(TIMED_OUT))
        assert 0.3 <= time.monotonic() - began < 10

    def test_output_is_kept_from_who_hung_up(
        self, server: WsmanServer, begin: Callable[[str], tuple[str, str]], tmp_path: Path
    ) -> None:
        go = tmp_path / "go"
        shell, command = begin(f"until [ -e {go} ]; do sleep 0.02; done; echo x")
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        with connection(server, https=True) as opened:
            asked = receive(shell, command)
            opened.request("POST", "/wsman", asked, {"Authorization": f"Basic {token}"})
        go.touch()
        answer = post(server, receive(shell, command))
        root = ElementTree.fromstring(answer.body)
        assert root.findtext(f".//{{{SHELL}}}Stream") == base64.b64encode(b"x\n").decode()

    @pytest.mark.parametrize(
        ("asked", "fault"),
        [
            (envelope(f"{SHELL}/Command", shell="none"), ("w:InvalidSelectors", SHELL_NOT_FOUND)),
            (envelope(f"{SHELL}/Connect", shell="none"), ("a:ActionNotSupported", 2150858771)),
            (
                envelope(f"{TRANSFER}/Get", resource="http://example.org/none"),
                ("a:DestinationUnreachable", 2150858752),
            ),
            (
                envelope(f"{TRANSFER}/Create", "<rsp:Shell/>", size=8191),
                ("w:EncodingLimit", 2150858878),
            ),
            (envelope(f"{TRANSFER}/Create"), ("w:SchemaValidationError", 2150858817)),
        ],
    )
    def test_a_fault_says_what_is_wrong(
        self, server: WsmanServer, asked: str, fault: tuple[str, int]
    ) -> None:
        answer = post(server, asked)
        assert (answer.status, *answer.fault) == (500, fault[0], str(fault[1]))

    def test_a_command_that_is_not_there_is_a_fault(
        self, server: WsmanServer, begin: Callable[[str], tuple[str, str]]
    ) -> None:
        shell, _ = begin("true")
        assert post(server, receive(shell, "none")).fault == ("w:InvalidParameter", "87")

    def test_a_31st_shell_is_too_many(self, tmp_path: Path) -> None:
        with WsmanServer(tmp_path) as server:
            create = envelope(f"{TRANSFER}/Create", "<rsp:Shell/>")
            assert [post(server, create).status for _ in range(30)] == [200] * 30
            assert post(server, create).fault[0] == "w:QuotaLimit"

    def test_an_idle_shell_is_closed(self, server: WsmanServer) -> None:
        body = "<rsp:Shell><rsp:IdleTimeOut>PT0.01S</rsp:IdleTimeOut></rsp:Shell>"
        created = post(server, envelope(f"{TRANSFER}/Create", body))
        name = ElementTree.fromstring(created.body).findtext(f".//{{{SHELL}}}ShellId", "")
        command = "<rsp:CommandLine><rsp:Command>exec sleep 1000</rsp:Command></rsp:CommandLine>"
        until(lambda: post(server, envelope(f"{SHELL}/Command", command, shell=name)).status == 500)


BOMB = '<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">]><b>&b;</b>'


class TestHostility:
    @pytest.mark.parametrize(
        "body",
        [
            BOMB,
            '<!DOCTYPE b SYSTEM "file:///etc/passwd"><b/>',
            "<a>" * 200 + "</a>" * 200,
            "<a>" + "<b/>" * 10_000 + "</a>",
            "<a>",
            "not xml",
            "<a/>",
            b"\xff\xfe<\x00",
            "\0",
        ],
    )
    def test_what_is_no_envelope_is_refused(self, server: WsmanServer, body: str | bytes) -> None:
        assert post(server, body).status == 400

    @pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999999", "9" * 100])
    def test_a_length_that_cannot_be_is_refused(self, server: WsmanServer, length: str) -> None:
        with connection(server, https=False) as opened:
            opened.putrequest("POST", "/wsman")
            opened.putheader("Content-Length", length)
            opened.endheaders()
            assert opened.getresponse().status in {411, 413}

    def test_an_envelope_over_the_limit_is_refused(self, server: WsmanServer) -> None:
        for size in (520_000, 3_000_000):
            assert post(server, b"x" * size).status == 413
            assert post(server, b"x" * size, basic=False).status == 413

    def test_a_body_without_a_length_is_refused(self, server: WsmanServer) -> None:
        with connection(server, https=False) as opened:
            opened.putrequest("POST", "/wsman")
            opened.putheader("Transfer-Encoding", "chunked")
            opened.endheaders()
            assert opened.getresponse().status == 411

    def test_another_path_is_not_there(self, server: WsmanServer) -> None:
        with connection(server, https=False) as opened:
            opened.request("POST", "/other", b"")
            assert opened.getresponse().status == 404

    def test_any_token_is_refused(self, server: WsmanServer) -> None:
        source = random.Random(2)
        with connection(server, https=False) as opened:
            for number in range(200):
                token = source.randbytes(source.randrange(200))
                if number % 2:
                    token = b"NTLMSSP\0" + source.choice([b"\1", b"\3"]) + b"\0\0\0" + token
                text = base64.b64encode(token).decode()
                scheme = source.choice(["Negotiate", "Basic", "NTLM", ""])
                opened.request("POST", "/wsman", b"", {"Authorization": f"{scheme} {text}"})
                response = opened.getresponse()
                assert response.status == 401
                response.read()

    def test_who_came_in_came_in_by_one_connection(self, server: WsmanServer) -> None:
        context = spnego.client(
            USER, PASSWORD, protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm
        )
        with (
            connection(server, https=False) as opened,
            connection(server, https=False) as another,
        ):

            def ask(by: http.client.HTTPConnection, token: bytes | None = None) -> tuple[int, str]:
                text = base64.b64encode(token or b"").decode()
                more = {} if token is None else {"Authorization": f"Negotiate {text}"}
                by.request("POST", "/wsman", b"", more)
                response = by.getresponse()
                response.read()
                return response.status, response.headers.get("WWW-Authenticate", "")

            status, challenge = ask(opened, context.step())
            assert status == 401
            answer = context.step(base64.b64decode(challenge.removeprefix("Negotiate ")))
            assert ask(another, answer)[0] == 401
            assert ask(opened, answer) == (200, "")
            assert ask(opened) == (200, "")
            assert ask(another) == (401, "Negotiate")

    def test_a_sealed_message_that_was_changed_is_refused(self, server: WsmanServer) -> None:
        class Tampered(WinRMEncryption):
            def wrap_message(self, message: bytes) -> tuple[str, bytes]:
                kind, sealed = super().wrap_message(message)
                tail = b"--Encrypted Boundary--\r\n"
                data = sealed[: -len(tail)]
                return kind, data[:-1] + bytes([data[-1] ^ 1]) + tail

        with client(server) as wsman:
            opened = WinRS(wsman)
            opened.open()
            sealing = wsman.transport.encryption
            assert sealing is not None
            wsman.transport.encryption = Tampered(sealing.context, sealing.protocol)
            with pytest.raises(WinRMTransportError) as caught:
                opened.close()
            assert caught.value.code == 400

    def test_a_sealed_message_of_nobody_is_refused(self, server: WsmanServer) -> None:
        kind = (
            'multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted"'
            ';boundary="Encrypted Boundary"'
        )
        for https, status in ((True, 500), (False, 401)):
            answer = post(server, b"x" * 100, https=https, headers={"Content-Type": kind})
            assert answer.status == status

    def test_the_password_is_in_no_list_of_processes(self, server: WsmanServer) -> None:
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{server.process.pid}/{name}").read_bytes()
            assert PASSWORD.encode() not in content

    @pytest.mark.parametrize("users", ["", "tester", "tester:", ":secret", "a:secret:c"])
    def test_a_file_of_users_that_cannot_be_is_told(self, tmp_path: Path, users: str) -> None:
        (tmp_path / "users").touch(mode=0o600)
        (tmp_path / "users").write_text(users)
        assert "secret" not in self.told(tmp_path / "users")

    def test_a_file_of_users_that_others_may_read_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "users").write_text("tester:secret")
        (tmp_path / "users").chmod(0o640)
        assert "0600" in self.told(tmp_path / "users")

    @staticmethod
    def told(users: Path) -> str:
        ended = subprocess.run(
            [sys.executable, PROGRAM, "--users", users, "--http", "0"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"wsman: {users}:")
        return ended.stderr
