"""Sessions with a WinRM server, by pywinrm, which is an extra: import this only where it is used."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import requests
import xmltodict  # type: ignore[import-untyped]
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from winrm.exceptions import (
    InvalidCredentialsError,
    WinRMOperationTimeoutError,
    WinRMTransportError,
    WSManFaultError,
)
from winrm.protocol import Protocol
from winrm.transport import Transport

from pytest_kdriver.guest.words import words

if TYPE_CHECKING:
    from pytest_kdriver.guest.links.winrm import WinrmConfig

SMALL_ENVELOPE: Final = 150 << 10
"""The most bytes of an envelope that each server takes: what Windows Server 2008 R2 allows."""

LARGE_ENVELOPE: Final = 500 << 10
"""What later servers allow by themselves. Where one allows more, it is not used."""

CONNECT_TIMEOUT: Final = 10.0
"""How long, in seconds, a server may take to answer a connection once it was reached."""

SPARE: Final = 10.0
"""How much longer, in seconds, an answer is waited for than the server was told to take."""

_IDLE: Final = 30.0
"""How long, in seconds, a connection may be silent before a new one is made: HTTP servers hang up on such
ones (Windows after 120 s), and what is sent just then may be lost or not."""

_SHELL_IDLE: Final = "PT180.000S"
"""When a shell is deleted of which nobody hears any more: its host was killed, say."""

_AROUND: Final = 8 << 10
"""How many bytes of an envelope are not its data: the header, and what encryption adds."""

_LONGEST_ANSWER: Final = 2 * LARGE_ENVELOPE
"""The most bytes of an answer, which is held in memory. Servers keep to the size that they were told."""

_ID: Final = uuid.uuid4().hex
_DATA: Final = uuid.uuid4().hex
"""Stand for an envelope's id and data until these are put in; base64 has nothing to be escaped."""

_SHELL: Final = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
_CONFIG: Final = "http://schemas.microsoft.com/wbem/wsman/1/config"
_GET: Final = "http://schemas.xmlsoap.org/ws/2004/09/transfer/Get"

_ACCESS_DENIED = 5

_QUOTAS: Final = frozenset(
    {0x803381A5, 0x803381A6, 0x803381A7, 0x803381A8, 0x803381AB, *range(0x803381E4, 0x803381E8)}
)
"""wsmerror.h: the ERROR_WSMAN_QUOTA_ codes of shells, operations, users, the system."""

_EXPIRED, _NOT_YET = 10, 9
_UNTRUSTED = frozenset({18, 19, 20, 21})
_OTHER_NAME = frozenset({62, 64})

OperationTimeout = WinRMOperationTimeoutError

_E = TypeVar("_E", bound=BaseException)


class BadAnswer(Exception):
    """An answer that no WinRM server gives, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a Receive brought. ``exit_code`` is None while the command runs."""

    stdout: bytes
    stderr: bytes
    is_over: bool
    exit_code: int | None


class Line:
    """A session's TCP connection, which any thread can cut: who waits for an answer sees an error at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def take(self, connection: socket.socket) -> socket.socket:
        """Take the connection that was just made; it is given back.

        What is kept is another descriptor of it, for TLS detaches the first one from its object.
        """
        self.drop()
        with self._lock:
            if self._is_cut:
                connection.close()
                raise ConnectionAbortedError("the connection was cut")
            self._socket = connection.dup()
        return connection

    def cut(self) -> None:
        """End the connection, and each that would be made."""
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections be made again."""
        with self._lock:
            self._is_cut = False

    def drop(self) -> None:
        """Forget the connection, which is closed elsewhere."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None


@contextlib.contextmanager
def cut_at(line: Line, deadline: float) -> Iterator[None]:
    """Cut the line at the deadline: the timeouts of HTTP are those of one read each."""
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), line.cut)
    timer.name = "kdriver-winrm-deadline"
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class _Adapter(HTTPAdapter):
    """HTTP over one connection, which is a ``Line``, with timeouts of its own."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.timeout = (CONNECT_TIMEOUT, CONNECT_TIMEOUT)
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(
        self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: object
    ) -> None:
        super().init_poolmanager(connections, maxsize, block, **pool_kwargs)
        line = self._line

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return line.take(super()._new_conn())

        class Encrypted(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return line.take(super()._new_conn())

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class EncryptedPool(HTTPSConnectionPool):
            ConnectionCls = Encrypted

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": EncryptedPool}

    def send(
        self, request: requests.PreparedRequest, *args: Any, **kwargs: Any
    ) -> requests.Response:
        response = super().send(request, *args, **{**kwargs, "timeout": self.timeout})
        try:
            _check_answer(request, response)
        except BaseException:
            response.close()
            raise
        return response


def _check_answer(request: requests.PreparedRequest, response: requests.Response) -> None:
    """``BadAnswer`` for what leads elsewhere, is too long, or is not encrypted though the request was."""
    if response.is_redirect:
        raise BadAnswer("it sends us elsewhere; a proxy or another server is there, not WinRM")
    unauthorized = response.status_code == requests.codes.unauthorized
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > _LONGEST_ANSWER:
        raise BadAnswer(f"its answer has {length} bytes")
    was_sealed, is_sealed = (
        str(message.headers.get("Content-Type", "")).startswith("multipart/encrypted")
        for message in (request, response)
    )
    if was_sealed and not is_sealed and not unauthorized and length != "0":
        raise BadAnswer("its answer is not encrypted, though what it was asked is")
    if not length.isdecimal() and not unauthorized:
        content = bytearray()
        for part in response.iter_content(1 << 16):
            content += part
            if len(content) > _LONGEST_ANSWER:
                raise BadAnswer(f"its answer has more than {_LONGEST_ANSWER} bytes")
        response._content = bytes(content)


class _Transport(Transport):
    """pywinrm's, over an ``_Adapter``."""

    adapter: _Adapter

    def build_session(self) -> requests.Session:
        session = super().build_session()
        session.trust_env = False
        self._mount(session)
        return session

    def setup_encryption(self, session: requests.Session) -> None:
        self._mount(session)  # for this sends the first request
        super().setup_encryption(session)
        if getattr(session.auth, "session_security", None) is None:
            raise BadAnswer(
                "it did not ask who we are; a proxy or another server is there, not WinRM"
            )

    def _mount(self, session: requests.Session) -> None:
        if session.get_adapter(self.endpoint) is not self.adapter:
            session.mount(self.endpoint, self.adapter)


class Session(Protocol):
    """One connection to the server, with its own authentication. One thread at a time uses it.

    No proxy is used, whatever the environment says: NTLM belongs to a connection, and the machine under
    test is near. Errors are those of pywinrm, requests and ElementTree; ``explain`` has words for them.
    """

    def __init__(self, config: WinrmConfig) -> None:
        scheme = "https" if config.https else "http"
        host = f"[{config.host}]" if ":" in config.host else config.host
        endpoint = f"{scheme}://{host}:{config.effective_port}/wsman"
        super().__init__(endpoint, username=config.user, password=config.password)
        self.line = Line()
        self.envelope = SMALL_ENVELOPE
        self.transport: _Transport = _Transport(
            endpoint,
            username=config.user,
            password=config.password,
            auth_method="basic" if config.basic else "ntlm",
            message_encryption="never" if config.https or config.basic else "always",
            server_cert_validation="validate",
            ca_trust_path=_authorities(config),  # type: ignore[arg-type]  # None is allowed
            proxy=None,
        )
        self.transport.adapter = _Adapter(self.line)
        self._used = 0.0
        self._operation_timeout = 0.0
        self._input: tuple[object, str] = (None, "")

    @property
    def payload(self) -> int:
        """How many bytes of data fit into an envelope."""
        return (self.envelope - _AROUND) // 4 * 3

    def build_wsman_header(self, *args: object, **kwargs: object) -> dict[str, object]:
        """As pywinrm's, with our sizes and times."""
        envelope: dict[str, dict[str, object]] = super().build_wsman_header(*args, **kwargs)  # type: ignore[arg-type]
        header = envelope["env:Header"]
        header["w:MaxEnvelopeSize"] = {"@mustUnderstand": "true", "#text": str(self.envelope)}
        header["w:OperationTimeout"] = f"PT{self._operation_timeout:.3f}S"
        return dict(envelope)

    def send_message(self, message: str) -> bytes:
        """As pywinrm's, over a connection that was not silent for long."""
        now = time.monotonic()
        if now - self._used > _IDLE:
            self.forget()
        try:
            return super().send_message(message)
        finally:
            self._used = time.monotonic()

    def within(self, seconds: float) -> Session:
        """Give the server that many seconds for each request from now on, and the network ``SPARE``."""
        self._operation_timeout = max(seconds, 0.1)
        self.transport.adapter.timeout = (
            min(CONNECT_TIMEOUT, self._operation_timeout),
            self._operation_timeout + SPARE,
        )
        return self

    def forget(self) -> None:
        """Close the connection; the next request makes a new one, and says anew who we are."""
        self.transport.close_session()
        self.line.drop()

    def close(self) -> None:
        """End the connection for good."""
        self.line.cut()
        self.forget()
        self.transport.adapter.close()

    def ask_envelope(self) -> int:
        """How large an envelope may be, in bytes; what all servers take where this one does not say."""
        message = {"env:Envelope": self.build_wsman_header(action=_GET, resource_uri=_CONFIG)}
        message["env:Envelope"]["env:Body"] = {}
        try:
            answer = ET.fromstring(self.send_message(xmltodict.unparse(message)))  # noqa: S314  # expat bounds entities
        except WSManFaultError:
            return SMALL_ENVELOPE
        told = answer.findtext(f".//{{{_CONFIG}}}MaxEnvelopeSizekb") or ""
        if not told.strip().isdecimal():
            return SMALL_ENVELOPE
        return max(4 * _AROUND, min(int(told) << 10, LARGE_ENVELOPE))

    def open(self) -> str:
        """Open a shell; its id."""
        return self.open_shell(codepage=65001, idle_timeout=_SHELL_IDLE)

    def start(self, shell: str, command: str) -> str:
        """Start the command in the shell, with pipes for all its streams; its id."""
        return self.run_command(shell, command, console_mode_stdin=False, skip_cmd_shell=False)

    def send_input(self, shell: str, command: str, data: bytes, *, end: bool = False) -> None:
        """Write to the command's standard input."""
        key = (shell, command, end, self._operation_timeout)
        if self._input[0] != key:
            self._input = (key, self._input_envelope(shell, command, end=end))
        text = self._input[1].replace(_ID, str(uuid.uuid4()).upper())
        ET.fromstring(self.send_message(text.replace(_DATA, base64.b64encode(data).decode())))  # noqa: S314

    def _input_envelope(self, shell: str, command: str, *, end: bool) -> str:
        """An envelope without its data. To make it anew each time takes a tenth of the time of a Send."""
        stream = {
            "@Name": "stdin",
            "@CommandId": command,
            "@End": "true" if end else "false",
            "#text": _DATA,
        }
        message = self._message(shell, "Send", {"rsp:Send": {"rsp:Stream": stream}}, _ID)
        return xmltodict.unparse(message)  # type: ignore[no-any-return]  # its types are not known

    def receive_output(self, shell: str, command: str) -> Output:
        """Wait for output. ``OperationTimeout`` if there was none."""
        answer = self._request(
            shell,
            "Receive",
            {
                "rsp:Receive": {
                    "rsp:DesiredStream": {"@CommandId": command, "#text": "stdout stderr"}
                }
            },
        )
        data = {"stdout": b"", "stderr": b""}
        ended = set()
        for stream in answer.iter(f"{{{_SHELL}}}Stream"):
            name = stream.get("Name", "")
            data[name] = data.get(name, b"") + base64.b64decode(stream.text or "")
            if stream.get("End", "").lower() in {"true", "1"}:
                ended.add(name)
        exit_code = None
        for state in answer.iter(f"{{{_SHELL}}}CommandState"):
            if state.get("State", "").endswith("/Done"):
                exit_code = int(state.findtext(f"{{{_SHELL}}}ExitCode") or "-1")
        return Output(
            stdout=data["stdout"],
            stderr=data["stderr"],
            is_over=exit_code is not None or "stdout" in ended,
            exit_code=exit_code,
        )

    def _request(self, shell: str, action: str, body: Mapping[str, object]) -> ET.Element:
        message = xmltodict.unparse(self._message(shell, action, body))
        return ET.fromstring(self.send_message(message))  # noqa: S314

    def _message(
        self, shell: str, action: str, body: Mapping[str, object], message_id: str | None = None
    ) -> dict[str, object]:
        envelope = self.build_wsman_header(
            action=f"{_SHELL}/{action}",
            resource_uri=f"{_SHELL}/cmd",
            shell_id=shell,
            message_id=message_id,
        )
        return {"env:Envelope": envelope | {"env:Body": body}}


def took_too_long(error: Exception) -> bool:
    """Whether nothing is known but that no answer came in time."""
    return isinstance(error, (requests.Timeout, WinRMOperationTimeoutError))


def never_connected(error: Exception) -> bool:
    """Whether nobody took the connection."""
    return isinstance(error, requests.ConnectTimeout)


def is_down(error: Exception) -> bool:
    """Whether nobody listens, or whoever does hangs up."""
    if isinstance(error, requests.exceptions.SSLError):
        return _find(error, ssl.SSLEOFError) is not None
    return isinstance(error, requests.ConnectionError)


def nobody_listens(error: Exception) -> bool:
    """Whether the connection was refused."""
    return _find(error, ConnectionRefusedError) is not None


def explain(error: Exception, config: WinrmConfig) -> str:
    """What happened, in words that a person can act on. They never have the password."""
    for kind, tell in _EXPLANATIONS:
        if isinstance(error, kind):
            return tell(error, config)
    return f"its answer makes no sense ({type(error).__name__}: {words(str(error))}); is it WinRM?"


def _explain_refusal(_error: Exception, config: WinrmConfig) -> str:
    told = f"it refused the user {config.user} (401): the user or the password is wrong"
    if config.basic:
        return f"{told}, or it does not allow Basic (winrm/config/service/auth)"
    return f"{told}, or the user is a local administrator {_FILTERED}"


_FILTERED = (
    "whose rights are taken away over the network: set LocalAccountTokenFilterPolicy to 1 "
    r"in HKLM\SOFTWARE\Microsoft\Windows\CurrentVersion\Policies\System"
)


def _explain_fault(error: Exception, _config: WinrmConfig) -> str:
    assert isinstance(error, WSManFaultError)
    code = error.wsman_fault_code
    told = words(error.reason.strip())
    if code is not None:
        told = f"{told} (0x{code:08X})"
    if code in _QUOTAS or (error.fault_subcode or "").endswith(":QuotaLimit"):
        return (
            f"{told}: a quota of its is used up; end other shells, or raise it (winrm/config/winrs)"
        )
    if code == _ACCESS_DENIED:
        return f"{told}: the user is no administrator there, or one {_FILTERED}"
    return told


def _explain_status(error: Exception, config: WinrmConfig) -> str:
    assert isinstance(error, WinRMTransportError)
    text = error.response_text.strip()
    told = f"it answered with HTTP status {error.code}"
    if error.code == 404:
        told = f"{told}: nothing is at {config.host}:{config.effective_port}/wsman"
    if error.code == 413:
        told = f"{told}: what was sent is larger than it said it takes (MaxEnvelopeSizekb)"
    if text[:1] == "<" and "html" in text[:200].lower():
        return f"{told} and a page; a proxy or another server is there, not WinRM"
    return f"{told}: {words(text[:200])}" if text else told


_HUNG_UP = "the connection was lost: it hung up"


def _explain_certificate(error: Exception, config: WinrmConfig) -> str:
    cause = _find(error, ssl.SSLCertVerificationError)
    if _find(error, ssl.SSLEOFError) is not None:
        return _HUNG_UP
    if cause is None:
        return f"TLS did not work out: {words(str(_find(error, ssl.SSLError) or error))}"
    told = f"its certificate is not accepted: {words(cause.verify_message)}"
    if cause.verify_code == _EXPIRED:
        return f"{told}; make it a new one, or set the clock, if that is wrong"
    if cause.verify_code == _NOT_YET:
        return f"{told}; is the clock of this machine or of that one wrong?"
    if cause.verify_code in _UNTRUSTED:
        return (
            f"{told}; name the file of who signed it, or of itself if it is self-signed, as its CA"
        )
    if cause.verify_code in _OTHER_NAME:
        return f"{told}; reach it by a name that the certificate has, not as {config.host}"
    return told


def _explain_connection(error: Exception, _config: WinrmConfig) -> str:
    cause = _find(error, OSError)
    if nobody_listens(error):
        return "the connection was refused; does WinRM run there, and listen at this port?"
    if isinstance(cause, socket.gaierror):
        return f"its name can't be resolved: {cause.strerror}"
    if cause is not None and cause.strerror:
        return f"the connection was lost: {cause.strerror}"
    return _HUNG_UP


def _explain_xml(error: Exception, _config: WinrmConfig) -> str:
    return f"its answer is no SOAP ({error}); a proxy or another server is there, not WinRM"


def _explain_timeout(_error: Exception, _config: WinrmConfig) -> str:
    return "it is silent"


_EXPLANATIONS: Final[
    tuple[tuple[type[Exception], Callable[[Exception, WinrmConfig], str]], ...]
] = (
    (BadAnswer, lambda error, _: str(error)),
    (InvalidCredentialsError, _explain_refusal),
    (WSManFaultError, _explain_fault),
    (WinRMTransportError, _explain_status),
    (requests.exceptions.SSLError, _explain_certificate),
    (requests.Timeout, _explain_timeout),
    (WinRMOperationTimeoutError, _explain_timeout),
    (requests.RequestException, _explain_connection),
    (ET.ParseError, _explain_xml),
)


def _find(error: BaseException, kind: type[_E]) -> _E | None:
    """The innermost error of this kind among those that this one came of, which has the most to say."""
    found = None
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop()
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            if isinstance(cause, kind) and not isinstance(cause, requests.RequestException):
                found = cause
            waiting += [*cause.args, getattr(cause, "reason", None), cause.__context__]
    return found


def _authorities(config: WinrmConfig) -> str | None:
    """Where the certificates are that are trusted; None is certifi's."""
    if config.ca is not None:
        return str(config.ca)
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath
