#!/usr/bin/env python3
"""A WS-Management endpoint with the remote command shell of WinRM, as [MS-WSMV] describes both.

A command is run by ``/bin/sh -c``. Its output waits in its pipes, which bound it: nothing is read before a
Receive asks. One Send at a time is taken ahead of what the program reads; the next one waits.

Negotiate with NTLM belongs to a TCP connection; over HTTP each message is sealed, over HTTPS it is bound to
the certificate (as with a CbtHardeningLevel of Strict). Basic is for HTTPS.

Where a fault's section is named, its form is given there. "Not verified on Windows" is one that is not.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

import spnego
from cryptography import x509
from spnego.channel_bindings import GssChannelBindings
from spnego.exceptions import SpnegoError

SOAP: Final = "http://www.w3.org/2003/05/soap-envelope"
ADDRESSING: Final = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
TRANSFER: Final = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
WSMAN: Final = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
WSMV: Final = "http://schemas.microsoft.com/wbem/wsman/1/wsman.xsd"
SHELL: Final = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
CMD: Final = f"{SHELL}/cmd"
CONFIG: Final = "http://schemas.microsoft.com/wbem/wsman/1/config"
IDENTITY: Final = "http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd"
ANONYMOUS: Final = f"{ADDRESSING}/role/anonymous"
FAULT_ACTION: Final = "http://schemas.dmtf.org/wbem/wsman/1/wsman/fault"
FAULT_DETAIL: Final = "<w:FaultDetail>http://schemas.dmtf.org/wbem/wsman/1/wsman/faultDetail"
ADDRESSING_FAULT: Final = f"{ADDRESSING}/fault"

_PREFIXES: Final = {
    "s": SOAP,
    "a": ADDRESSING,
    "x": TRANSFER,
    "w": WSMAN,
    "p": WSMV,
    "rsp": SHELL,
}

MAX_TIMEOUT: Final = 60.0
"""MaxTimeoutms ([MS-WSMV] 2.2.4.10), in seconds; what stands for a longer one, and for none (3.1.4.1.6)."""

IDLE_TIMEOUT: Final = 7200.0
"""How long, in seconds, a shell that nobody uses is kept, if Create says nothing else (IdleTimeOut)."""

MAX_SHELLS: Final = 30
"""MaxShellsPerUser."""

MAX_COMMANDS: Final = 25
"""MaxProcessesPerShell."""

MAX_CONNECTIONS: Final = 300

MIN_ENVELOPE: Final = 8192
"""The smallest MaxEnvelopeSize, in bytes, that a client may ask for ([MS-WSMV] 3.1.4.1.7)."""

_MAX_DEPTH = 32
_MAX_ELEMENTS = 4096
_SEALING = 4096
"""What sealing and its multipart headers may add to an envelope, in bytes."""

_PIPE = 1 << 20
_DISCARDED = 4 << 20
_TICK = 0.5
"""How often, in seconds, who waits looks at what wakes nobody: a client that hung up."""

_GRACE = 2.0
"""How long, in seconds, a program may take to end after Ctrl+C."""

_QUESTION_MARKS: Final = bytes(byte if byte < 0x80 else ord("?") for byte in range(256))

_SPNEGO = "application/HTTP-SPNEGO-session-encrypted"
_BOUNDARY = b"--Encrypted Boundary"
_SEALED = re.compile(
    rb"--Encrypted Boundary\r\n"
    rb"\s*Content-Type: application/HTTP-SPNEGO-session-encrypted\r\n"
    rb"\s*OriginalContent: type=[^\r\n]{1,100};Length=(\d{1,9})\r\n"
    rb"--Encrypted Boundary\r\n"
    rb"\s*Content-Type: application/octet-stream\r\n"
)
"""[MS-WSMV] 2.2.9.1.1.2."""

_DURATION = re.compile(
    r"P(?:(\d{1,6})D)?(?:T(?:(\d{1,6})H)?(?:(\d{1,6})M)?(?:(\d{1,9}(?:\.\d{1,9})?)S)?)?"
)


class Fault(Exception):
    """A SOAP fault, with a WSManFault in its detail ([MS-WSMV] 2.2.4.43)."""

    def __init__(
        self,
        subcode: str,
        code: int,
        reason: str,
        *,
        receiver: bool = False,
        message: str | None = None,
        detail: str = "",
        action: str = FAULT_ACTION,
    ) -> None:
        super().__init__(reason)
        self.subcode = subcode
        self.code = code
        self.reason = reason
        self.receiver = receiver
        self.message = message or reason
        self.detail = detail
        self.action = action

    def body(self) -> str:
        return (
            f"<s:Fault><s:Code><s:Value>s:{'Receiver' if self.receiver else 'Sender'}</s:Value>"
            f"<s:Subcode><s:Value>{self.subcode}</s:Value></s:Subcode></s:Code>"
            f'<s:Reason><s:Text xml:lang="en-US">{escape(self.reason)}</s:Text></s:Reason>'
            f"<s:Detail>{self.detail}"
            '<f:WSManFault xmlns:f="http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"'
            f" Code={quoteattr(str(self.code))} Machine={quoteattr(socket.gethostname())}>"
            f"<f:Message>{escape(self.message)}</f:Message></f:WSManFault></s:Detail></s:Fault>"
        )


def _timed_out() -> Fault:
    # [MS-WSMV] 3.1.4.14, and 3.1.4.1.6 for the other operations.
    return Fault(
        "w:TimedOut",
        2150858793,
        "The WS-Management service cannot complete the operation within the time specified in "
        "OperationTimeout.",
        receiver=True,
    )


def _shell_not_found(shell: str) -> Fault:
    # [DMTF-DSP0226] wsman:InvalidSelectors; the message is that of the shell's plug-in.
    return Fault(
        "w:InvalidSelectors",
        2150858843,
        "The WS-Management service cannot process the request because the request contained invalid "
        "selectors for the resource.",
        message=f"The request for the Windows Remote Shell with ShellId {shell} failed because the shell was "
        "not found on the server. Possible causes are: the specified ShellId is incorrect or the shell no "
        "longer exists on the server. Provide the correct ShellId or create a new shell and retry the "
        "operation.",
        detail=f"{FAULT_DETAIL}/UnexpectedSelectors</w:FaultDetail>",
    )


def _command_not_found() -> Fault:
    # [DMTF-DSP0226] wsman:InvalidParameter; the code, ERROR_INVALID_PARAMETER, is not verified on Windows.
    return Fault("w:InvalidParameter", 87, "The parameter is incorrect.")


def _aborted() -> Fault:
    # [DMTF-DSP0226] wsman:InternalError, with ERROR_OPERATION_ABORTED: what a Receive meets when its
    # command is terminated. Not verified on Windows.
    return Fault(
        "w:InternalError",
        995,
        "The I/O operation has been aborted because of either a thread exit or an application request.",
        receiver=True,
    )


def _pipe_ended() -> Fault:
    # [DMTF-DSP0226] wsman:InternalError, with ERROR_BROKEN_PIPE: a Send to a program that has ended. The
    # code's form is not verified on Windows.
    return Fault("w:InternalError", 2147942509, "The pipe has been ended.", receiver=True)


def _unsupported_action(action: str) -> Fault:
    # [DMTF-DSP0226] wsa:ActionNotSupported, with ERROR_WSMAN_ACTION_NOT_SUPPORTED.
    return Fault(
        "a:ActionNotSupported",
        2150858771,
        "The WS-Management service does not support the action specified in the request.",
        detail=f"<a:Action>{escape(action)}</a:Action>",
        action=ADDRESSING_FAULT,
    )


def _unknown_resource() -> Fault:
    # [DMTF-DSP0226] wsa:DestinationUnreachable, with ERROR_WSMAN_RESOURCE_NOT_FOUND.
    return Fault(
        "a:DestinationUnreachable",
        2150858752,
        "The WS-Management service cannot process the request. The service cannot find the resource "
        "identified by the resource URI and selectors.",
        detail=f"{FAULT_DETAIL}/InvalidResourceURI</w:FaultDetail>",
        action=ADDRESSING_FAULT,
    )


def _envelope_too_small() -> Fault:
    # [MS-WSMV] 3.1.4.1.7, with ERROR_WSMAN_MIN_ENVELOPE_SIZE.
    return Fault(
        "w:EncodingLimit",
        2150858878,
        "The WS-Management service cannot process the request because the envelope size in the request is "
        "too small.",
        detail=f"{FAULT_DETAIL}/MinimumEnvelopeLimit</w:FaultDetail>",
    )


def _invalid_body() -> Fault:
    # [DMTF-DSP0226] wsman:SchemaValidationError, with ERROR_WSMAN_SCHEMA_VALIDATION_ERROR.
    return Fault(
        "w:SchemaValidationError",
        2150858817,
        "The SOAP XML in the message does not match the corresponding XML schema definition. Change the XML "
        "and retry.",
    )


def _too_many_shells() -> Fault:
    # [MS-WSMV] 3.1.4.5.2.1, with ERROR_WSMAN_QUOTA_MAX_SHELLS.
    return _too_many(
        2150859173,
        "The Windows Remote Shell cannot process the request. The server is already executing the maximum "
        "number of concurrent shells a user can remotely open on the same system. Retry later.",
    )


def _too_many_commands() -> Fault:
    # [DMTF-DSP0226] wsman:QuotaLimit, with ERROR_WSMAN_QUOTA_MAX_OPERATIONS.
    return _too_many(
        2150859174,
        "The maximum number of concurrent operations for this user has been exceeded.",
    )


def _too_many(code: int, message: str) -> Fault:
    return Fault(
        "w:QuotaLimit", code, f"The WS-Management service cannot process the request. {message}"
    )


def parse_xml(data: bytes) -> Element:
    """The element of a request. ``ValueError`` for a document type, and for what is too deep or too large."""
    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    depth = count = 0

    def qualified(name: str) -> str:
        return "{" + name if "}" in name else name

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth += 1
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_ELEMENTS:
            raise ValueError("the document is too deep or has too many elements")
        builder.start(qualified(name), {qualified(key): value for key, value in attributes.items()})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(qualified(name))

    def refuse(*_: object) -> None:
        raise ValueError("a document type is not allowed")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError("this is not XML") from error
    return builder.close()


def parse_duration(text: str) -> float:
    """An xs:duration without years and months, in seconds. ``ValueError`` for any other."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        raise ValueError("this is no duration")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the header and the body of an envelope say."""

    action: str
    resource: str
    message_id: str
    timeout: float
    max_envelope: int
    selectors: Mapping[str, str]
    options: Mapping[str, str]
    body: Element | None
    user: str
    deadline: float
    hung_up: Callable[[], bool]

    def child(self, name: str) -> Element:
        """The body, which must be this element of the shell's namespace."""
        if self.body is None or self.body.tag != f"{{{SHELL}}}{name}":
            raise _invalid_body()
        return self.body


def _text(element: Element | None) -> str:
    return "" if element is None else (element.text or "").strip()


def parse_request(
    root: Element, *, user: str, max_envelope: int, hung_up: Callable[[], bool]
) -> Request:
    """``ValueError`` where it is no SOAP envelope; a ``Fault`` where it can't be served."""
    header, body = root.find(f"{{{SOAP}}}Header"), root.find(f"{{{SOAP}}}Body")
    if root.tag != f"{{{SOAP}}}Envelope" or header is None or body is None:
        raise ValueError("this is no SOAP envelope with a header and a body")
    timeout, wanted = MAX_TIMEOUT, max_envelope
    with contextlib.suppress(ValueError):
        timeout = parse_duration(_text(header.find(f"{{{WSMAN}}}OperationTimeout")))
    with contextlib.suppress(ValueError):
        wanted = int(_text(header.find(f"{{{WSMAN}}}MaxEnvelopeSize")))
    timeout = min(timeout, MAX_TIMEOUT)
    return Request(
        action=_text(header.find(f"{{{ADDRESSING}}}Action")),
        resource=_text(header.find(f"{{{WSMAN}}}ResourceURI")),
        message_id=_text(header.find(f"{{{ADDRESSING}}}MessageID")),
        timeout=timeout,
        max_envelope=min(wanted, max_envelope),
        selectors=_named(header, "SelectorSet", "Selector"),
        options=_named(header, "OptionSet", "Option"),
        body=next(iter(body), None),
        user=user,
        deadline=time.monotonic() + timeout,
        hung_up=hung_up,
    )


def _named(header: Element, outer: str, inner: str) -> dict[str, str]:
    found = header.findall(f"{{{WSMAN}}}{outer}/{{{WSMAN}}}{inner}")
    return {element.get("Name", "").lower(): _text(element) for element in found}


def envelope(action: str, relates_to: str, body: str) -> bytes:
    """An answer."""
    names = "".join(f" xmlns:{prefix}={quoteattr(uri)}" for prefix, uri in _PREFIXES.items())
    return (
        f'<s:Envelope xml:lang="en-US"{names}><s:Header>'
        f"<a:Action>{escape(action)}</a:Action>"
        f"<a:MessageID>uuid:{str(uuid.uuid4()).upper()}</a:MessageID>"
        f"<a:To>{ANONYMOUS}</a:To><a:RelatesTo>{escape(relates_to)}</a:RelatesTo>"
        f"</s:Header><s:Body>{body}</s:Body></s:Envelope>"
    ).encode()


class Command:
    """A program that a shell runs, in a process group of its own."""

    def __init__(self, line: str, *, cwd: str | None, env: Mapping[str, str]) -> None:
        self.id = str(uuid.uuid4()).upper()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._stdin = self._process.stdin.fileno()
        self._outputs = {
            "stdout": self._process.stdout.fileno(),
            "stderr": self._process.stderr.fileno(),
        }
        for pipe in (self._stdin, *self._outputs.values()):
            os.set_blocking(pipe, False)
        for pipe in self._outputs.values():
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        self._exited = os.pidfd_open(self._process.pid)
        self._open = set(self._outputs)
        self._receiving = threading.Lock()
        self._sending = threading.Condition()
        self._pending = b""
        self._input_ends = self._input_closed = self._terminated = False
        self._writer = threading.Thread(target=self._write, name="wsman-stdin", daemon=True)
        self._writer.start()

    def send(self, data: bytes, *, end: bool, deadline: float) -> None:
        """Take data for the program; a fault, with nothing taken, while what came before waits."""
        with self._sending:
            free = self._sending.wait_for(
                lambda: not self._pending or self._input_closed,
                max(0.0, deadline - time.monotonic()),
            )
            if not free:
                raise _timed_out()
            if self._input_closed or self._input_ends or self._nobody_reads():
                raise _pipe_ended()
            self._pending = data
            self._input_ends = end
            self._sending.notify_all()

    def _nobody_reads(self) -> bool:
        poll = select.poll()
        poll.register(self._stdin, 0)
        return bool(poll.poll(0))

    def _write(self) -> None:
        """Write what is pending, and close the program's input after the last of it."""
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        while True:
            with self._sending:
                self._sending.wait_for(
                    lambda: self._pending or self._input_ends or self._terminated
                )
                data = self._pending
            while data and not self._terminated:
                try:
                    if poll.poll(_TICK * 1000):
                        data = data[os.write(self._stdin, data) :]
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                    self._input_ends = True
            with self._sending:
                self._pending = b""
                if self._input_ends or self._terminated:
                    self._input_closed = True
                self._sending.notify_all()
                if self._input_closed:
                    break
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()

    def receive(
        self, streams: Sequence[str], *, size: int, deadline: float, hung_up: Callable[[], bool]
    ) -> tuple[dict[str, bytes], int | None]:
        """What there is of these streams, ``size`` bytes at most, and the exit code if that is all.

        Waits for something; a fault if nothing comes.
        """
        if not self._receiving.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise _timed_out()
        try:
            while not self._terminated:
                if hung_up():
                    raise ConnectionAbortedError
                exited = bool(self._poll([self._exited], 0.0))
                taken = self._take(streams, size)
                if taken:
                    return taken, None
                if exited:
                    return {}, self._exit_code()
                wait = min(_TICK, deadline - time.monotonic())
                if wait <= 0:
                    raise _timed_out()
                wanted = [self._outputs[name] for name in self._open if name in streams]
                self._poll([*wanted, self._exited], wait)
            raise _aborted()
        finally:
            self._receiving.release()

    @staticmethod
    def _poll(files: Sequence[int], seconds: float) -> set[int]:
        poll = select.poll()
        for file in files:
            poll.register(file, select.POLLIN)
        return {file for file, _ in poll.poll(seconds * 1000)}

    def _take(self, streams: Sequence[str], size: int) -> dict[str, bytes]:
        ready = self._poll([self._outputs[name] for name in self._open], 0.0)
        names = [name for name in streams if name in self._open and self._outputs[name] in ready]
        taken = {}
        for place, name in enumerate(names):
            share = size // (len(names) - place)
            parts = []
            while share:
                try:
                    part = os.read(self._outputs[name], share)
                except BlockingIOError:
                    break
                if not part:
                    self._open.discard(name)
                    break
                parts.append(part)
                share -= len(part)
                size -= len(part)
            if parts:
                taken[name] = b"".join(parts)
        return taken

    def _exit_code(self) -> int:
        """As a shell tells it. The program stays a zombie, which keeps its group's number ours."""
        found = os.waitid(os.P_PIDFD, self._exited, os.WEXITED | os.WNOWAIT)
        assert found
        return found.si_status if found.si_code == os.CLD_EXITED else 128 + found.si_status

    def interrupt(self) -> None:
        """Ctrl+C for the whole group, and an end to what ignores it."""
        with self._sending:
            if self._terminated:
                return
            self._kill(signal.SIGINT)
            self._poll([self._exited], _GRACE)
            self._kill(signal.SIGKILL)

    def _kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def terminate(self) -> None:
        """End the whole group, and free what the command holds."""
        with self._sending:
            if self._terminated:
                return
            self._terminated = True
            self._sending.notify_all()
        self._kill(signal.SIGKILL)
        self._process.wait()
        self._writer.join()
        with self._receiving:
            os.close(self._exited)
            for pipe in (self._process.stdout, self._process.stderr):
                assert pipe
                pipe.close()


class Shell:
    """What commands run in."""

    def __init__(self, owner: str, body: Element) -> None:
        self.id = body.get("ShellId") or str(uuid.uuid4()).upper()
        self.owner = owner
        self._cwd = _text(body.find(f"{{{SHELL}}}WorkingDirectory")) or None
        self._env = {
            name: value
            for name, value in os.environ.items()
            if name not in {"NTLM_USER_FILE", "LM_COMPAT_LEVEL"}
        }
        for variable in body.findall(f"{{{SHELL}}}Environment/{{{SHELL}}}Variable"):
            self._env[variable.get("Name", "")] = variable.text or ""
        self.idle_timeout = IDLE_TIMEOUT
        with contextlib.suppress(ValueError):
            self.idle_timeout = parse_duration(_text(body.find(f"{{{SHELL}}}IdleTimeOut")))
        self._lock = threading.Lock()
        self._commands: dict[str, Command] = {}
        self._users = 0
        self._last_used = time.monotonic()
        self._closed = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._last_used = time.monotonic()

    def idle(self) -> bool:
        with self._lock:
            return not self._users and time.monotonic() - self._last_used > self.idle_timeout

    def run(self, line: str) -> Command:
        with self._lock:
            if self._closed:
                raise _shell_not_found(self.id)
            if len(self._commands) >= MAX_COMMANDS:
                raise _too_many_commands()
            try:
                command = Command(line, cwd=self._cwd, env=self._env)
            except (OSError, ValueError) as error:
                # [DMTF-DSP0226] wsman:InternalError. Not verified on Windows.
                raise Fault("w:InternalError", 87, str(error), receiver=True) from error
            self._commands[command.id] = command
        return command

    def command(self, name: str) -> Command:
        with self._lock:
            if (command := self._commands.get(name)) is None:
                raise _command_not_found()
        return command

    def terminate(self, name: str) -> None:
        command = self.command(name)
        command.terminate()
        with self._lock:
            self._commands.pop(name, None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            commands = list(self._commands.values())
            self._commands.clear()
        for command in commands:
            command.terminate()


class Service:
    """What the envelopes ask for."""

    def __init__(self, *, max_envelope: int, mangle: bool) -> None:
        self.max_envelope = max_envelope
        self._mangle = mangle
        self._lock = threading.Lock()
        self._shells: dict[str, Shell] = {}
        self._closed = False
        self._actions: dict[str, Callable[[Request, Shell], str]] = {
            f"{TRANSFER}/Delete": self._delete,
            f"{SHELL}/Command": self._command,
            f"{SHELL}/Send": self._send,
            f"{SHELL}/Receive": self._receive,
            f"{SHELL}/Signal": self._signal,
        }

    def answer(self, request: Request) -> tuple[int, bytes]:
        """An HTTP status and an envelope. ``ConnectionAbortedError`` if the client hung up meanwhile."""
        try:
            return 200, envelope(
                f"{request.action}Response", request.message_id, self._serve(request)
            )
        except Fault as fault:
            return 500, envelope(fault.action, request.message_id, fault.body())

    def _serve(self, request: Request) -> str:
        if request.max_envelope < MIN_ENVELOPE:
            raise _envelope_too_small()
        if request.action == f"{TRANSFER}/Get" and request.resource == CONFIG:
            return (
                f"<cfg:Config xmlns:cfg={quoteattr(CONFIG)}><cfg:MaxEnvelopeSizekb>"
                f"{self.max_envelope // 1024}</cfg:MaxEnvelopeSizekb></cfg:Config>"
            )
        if request.resource != CMD:
            raise _unknown_resource()
        if request.action == f"{TRANSFER}/Create":
            return self._create(request)
        if (act := self._actions.get(request.action)) is None:
            raise _unsupported_action(request.action)
        name = request.selectors.get("shellid", "")
        with self._lock:
            shell = self._shells.get(name)
        if shell is None or shell.owner != request.user:
            raise _shell_not_found(name)
        with shell.in_use():
            return act(request, shell)

    def _create(self, request: Request) -> str:
        """[MS-WSMV] 3.1.4.5.2."""
        shell = Shell(request.user, request.child("Shell"))
        with self._lock:
            owned = sum(other.owner == request.user for other in self._shells.values())
            if self._closed or owned >= MAX_SHELLS or shell.id in self._shells:
                raise _too_many_shells()
            self._shells[shell.id] = shell
        name = escape(shell.id)
        return (
            f"<x:ResourceCreated><a:Address>{ANONYMOUS}</a:Address><a:ReferenceParameters>"
            f"<w:ResourceURI>{CMD}</w:ResourceURI><w:SelectorSet>"
            f'<w:Selector Name="ShellId">{name}</w:Selector></w:SelectorSet>'
            "</a:ReferenceParameters></x:ResourceCreated>"
            f"<rsp:Shell><rsp:ShellId>{name}</rsp:ShellId><rsp:ResourceUri>{CMD}</rsp:ResourceUri>"
            f"<rsp:Owner>{escape(shell.owner)}</rsp:Owner>"
            f"<rsp:IdleTimeOut>PT{shell.idle_timeout:.3f}S</rsp:IdleTimeOut>"
            "<rsp:InputStreams>stdin</rsp:InputStreams>"
            "<rsp:OutputStreams>stdout stderr</rsp:OutputStreams></rsp:Shell>"
        )

    def _delete(self, _: Request, shell: Shell) -> str:
        with self._lock:
            self._shells.pop(shell.id, None)
        shell.close()
        return ""

    def _command(self, request: Request, shell: Shell) -> str:
        """[MS-WSMV] 3.1.4.11. Each option of Command is taken, and none changes how /bin/sh runs it."""
        body = request.child("CommandLine")
        words = [_text(body.find(f"{{{SHELL}}}Command"))]
        words += [argument.text or "" for argument in body.findall(f"{{{SHELL}}}Arguments")]
        command = shell.run(" ".join(words))
        return f"<rsp:CommandResponse><rsp:CommandId>{command.id}</rsp:CommandId></rsp:CommandResponse>"

    def _send(self, request: Request, shell: Shell) -> str:
        """[MS-WSMV] 3.1.4.13."""
        stream = request.child("Send").find(f"{{{SHELL}}}Stream")
        if stream is None or stream.get("Name") != "stdin":
            raise _invalid_body()
        try:
            data = base64.b64decode(_text(stream), validate=True)
        except binascii.Error:
            raise _invalid_body() from None
        shell.command(stream.get("CommandId", "")).send(
            data, end=stream.get("End", "").lower() in {"true", "1"}, deadline=request.deadline
        )
        return "<rsp:SendResponse/>"

    def _receive(self, request: Request, shell: Shell) -> str:
        """[MS-WSMV] 3.1.4.14."""
        wanted = request.child("Receive").find(f"{{{SHELL}}}DesiredStream")
        streams = [name for name in _text(wanted).split() if name in {"stdout", "stderr"}]
        if wanted is None or not streams:
            raise _invalid_body()
        name = wanted.get("CommandId", "")
        command = shell.command(name)
        spare = len(
            envelope(
                f"{request.action}Response",
                request.message_id,
                self._received(name, dict.fromkeys(streams, b""), -1),
            )
        )
        size = (request.max_envelope - spare) // 4 * 3 - 3 * len(streams)
        taken, code = command.receive(
            streams, size=size, deadline=request.deadline, hung_up=request.hung_up
        )
        if self._mangle and "stdout" in taken:
            taken["stdout"] = taken["stdout"].translate(_QUESTION_MARKS)
        if code is not None:
            taken = dict.fromkeys(streams, b"")
        return self._received(name, taken, code)

    @staticmethod
    def _received(name: str, taken: Mapping[str, bytes], code: int | None) -> str:
        command = quoteattr(name)
        end = "" if code is None else ' End="true"'
        streams = "".join(
            f'<rsp:Stream Name="{stream}" CommandId={command}{end}>'
            f"{base64.b64encode(data).decode()}</rsp:Stream>"
            for stream, data in taken.items()
        )
        state = "Running" if code is None else "Done"
        exit_code = "" if code is None else f"<rsp:ExitCode>{code}</rsp:ExitCode>"
        return (
            f"<rsp:ReceiveResponse>{streams}"
            f'<rsp:CommandState CommandId={command} State="{SHELL}/CommandState/{state}">'
            f"{exit_code}</rsp:CommandState></rsp:ReceiveResponse>"
        )

    def _signal(self, request: Request, shell: Shell) -> str:
        """[MS-WSMV] 3.1.4.12, 2.2.4.38."""
        body = request.child("Signal")
        name = body.get("CommandId", "")
        match _text(body.find(f"{{{SHELL}}}Code")).lower():
            case code if code == f"{SHELL}/signal/terminate":
                shell.terminate(name)
            case code if code in {f"{SHELL}/signal/ctrl_c", f"{SHELL}/signal/ctrl_break"}:
                shell.command(name).interrupt()
            case _:
                raise _invalid_body()
        return "<rsp:SignalResponse/>"

    def sweep(self) -> None:
        """End the shells that nobody used for too long."""
        with self._lock:
            idle = [shell for shell in self._shells.values() if shell.idle()]
            for shell in idle:
                del self._shells[shell.id]
        for shell in idle:
            shell.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            shells = list(self._shells.values())
            self._shells.clear()
        for shell in shells:
            shell.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Users:
    """Who may come in, and by what."""

    passwords: Mapping[str, bytes] = field(repr=False)

    def admit(self, token: str) -> str | None:
        """The user of a Basic token, if name and password are right."""
        try:
            name, _, password = base64.b64decode(token, validate=True).partition(b":")
            user = name.decode().lower()
        except ValueError:
            return None
        known = self.passwords.get(user)
        right = hmac.compare_digest(password, b"" if known is None else known)
        return user if right and known is not None else None


def read_users(path: Path) -> Users:
    """Lines of user:password. ``ValueError`` for what NTLM's file of credentials could not hold.

    And for a file that others may read.
    """
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path}: others may read it; it must be of mode 0600")
    passwords: dict[str, bytes] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        user, _, password = line.partition(":")
        if not user or not password or ":" in password:
            raise ValueError(f"{path}:{number}: not user:password, without another colon")
        passwords[user.lower()] = password.encode()
    if not passwords:
        raise ValueError(f"{path}: no user")
    return Users(passwords=passwords)


def offer_to_ntlm(users: Users) -> None:
    """Put the users where pyspnego looks for them: a file of ours that has no name in any folder."""
    file = os.memfd_create("users")
    os.write(
        file,
        b"".join(b":%b:%b\n" % (user.encode(), word) for user, word in users.passwords.items()),
    )
    os.environ["NTLM_USER_FILE"] = f"/proc/self/fd/{file}"
    os.environ["LM_COMPAT_LEVEL"] = "5"  # NTLMv2 only


def bindings_of(certificate: Path) -> GssChannelBindings:
    """tls-server-end-point of RFC 5929 section 4.1."""
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    name = found.signature_hash_algorithm.name if found.signature_hash_algorithm else "sha256"
    der = ssl.PEM_cert_to_DER_cert(
        certificate.read_text().split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----"
    )
    digest = hashlib.new("sha256" if name in {"md5", "sha1"} else name, der).digest()
    return GssChannelBindings(application_data=b"tls-server-end-point:" + digest)


class Server(ThreadingHTTPServer):
    """One port; ``listener`` listens there already."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        service: Service,
        users: Users,
        *,
        tls: ssl.SSLContext | None,
        bindings: GssChannelBindings | None,
        basic: bool,
        listener: socket.socket | None = None,
    ) -> None:
        super().__init__(address, Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()
        self.service = service
        self.users = users
        self.tls = tls
        self.bindings = bindings
        self.basic = basic
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is not None:  # the handshake is made by the connection's own thread
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exception()
        if not isinstance(error, OSError):  # who hangs up is no news
            print(f"wsman: {type(error).__name__}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One TCP connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 120.0
    server_version = "Microsoft-HTTPAPI/2.0"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._context: Any = None
        self._user: str | None = None
        self._sealed = False
        self._challenge: str | None = None

    def log_message(self, *_: object) -> None:
        """Say nothing: a request's line may be anything."""

    def do_POST(self) -> None:
        self._challenge = None
        body = self._read()
        if body is None:
            return
        if self.path.partition("?")[0] not in {"/wsman", "/wsman-anon/identify"}:
            self._reply(404)
            return
        anonymous = self.headers.get("WSMANIDENTIFY", "").lower() == "unauthenticated"
        authorization = self.headers.get("Authorization", "")
        user = self._user
        if authorization:
            user = self._authenticate(authorization)
        if user is None:
            if anonymous and not authorization:
                self._identify(body)
            else:
                self._refuse()
            return
        if not body:
            self._reply(200)
            return
        self._serve(user, body)

    def _read(self) -> bytes | None:
        """The body; None, with an answer given, if it is of no size or too large."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,12}", length):
            self._reply(411, close=True)
            return None
        # How a client is "notified that the request size exceeded the configured MaxEnvelopeSize quota"
        # (ERROR_WSMAN_HTTP_REQUEST_TOO_LARGE_STATUS).
        if int(length) > self.server.service.max_envelope + _SEALING:
            if int(length) <= _DISCARDED:
                self._discard(int(length))
            self._reply(413, close=True)
            return None
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            self.close_connection = True
            return None
        return body

    def _discard(self, size: int) -> None:
        """Take what is on its way, for an answer does not reach who is cut off while they send."""
        while size and (part := self.rfile.read(min(size, 1 << 16))):
            size -= len(part)

    def _authenticate(self, authorization: str) -> str | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "basic" and self.server.basic:
            return self.server.users.admit(token.strip())
        if scheme.lower() != "negotiate":
            return None
        if self._context is None or self._context.complete:
            self._user, self._context = None, self._new_context()
        try:
            answer = self._context.step(base64.b64decode(token, validate=True))
        except Exception:  # a token may be anything, and what can't be understood does not come in
            self._context = None
            return None
        self._challenge = base64.b64encode(answer).decode() if answer else None
        if self._context.complete:
            self._user = str(self._context.client_principal).lower()
        return self._user

    def _new_context(self) -> Any:
        return spnego.server(
            protocol="negotiate",
            options=spnego.NegotiateOptions.use_negotiate,
            channel_bindings=self.server.bindings,
        )

    def _refuse(self) -> None:
        """[MS-WSMV] 3.1.4.1.29.2, RFC 4559 section 4.1."""
        schemes = []
        if self._context is not None and self._challenge:
            schemes.append(f"Negotiate {self._challenge}")
        else:
            schemes.append("Negotiate")
            if self.server.basic:
                schemes.append('Basic realm="WSMAN"')
        self._challenge = None
        self._reply(401, schemes=schemes)

    def _serve(self, user: str, body: bytes) -> None:
        kind = self.headers.get("Content-Type", "")
        negotiated = self._user is not None
        sealed = kind.startswith("multipart/encrypted") and _SPNEGO in kind
        if sealed and negotiated and self._context is not None:
            opened = self._open(body)
            if opened is None:
                self._reply(400, close=True)
                return
            body = opened
        elif sealed or (negotiated and self.server.tls is None):
            # AllowUnencrypted is false: a status without a fault.
            self._reply(500, close=True)
            return
        try:
            root = parse_xml(body)
            if self._is_identify(root):
                self._send(200, self._identity(authenticated=True), sealed=sealed)
                return
            request = parse_request(
                root,
                user=user,
                max_envelope=self.server.service.max_envelope,
                hung_up=self._hung_up,
            )
        except ValueError:
            self._reply(400, close=True)
            return
        try:
            status, answer = self.server.service.answer(request)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        self._send(status, answer, sealed=sealed)

    def _open(self, body: bytes) -> bytes | None:
        """What is in a sealed message ([MS-WSMV] 2.2.9.1.1.2); None if it was not sealed by our peer."""
        head = _SEALED.match(body)
        tail = _BOUNDARY + b"--\r\n"
        if head is None or not body.endswith(tail):
            return None
        data = body[head.end() : -len(tail)]
        if len(data) < 4:
            return None
        (length,) = struct.unpack_from("<I", data)
        if length > len(data) - 4:
            return None
        try:
            opened: bytes = self._context.unwrap_winrm(data[4 : 4 + length], data[4 + length :])
        except SpnegoError:
            return None
        return opened if len(opened) == int(head[1]) else None

    def _send(self, status: int, body: bytes, *, sealed: bool) -> None:
        kind = "application/soap+xml;charset=UTF-8"
        if sealed:
            wrapped = self._context.wrap_winrm(body)
            original = f"{kind};Length={len(body) + wrapped.padding_length}"
            head = (
                f"\r\n\tContent-Type: {_SPNEGO}\r\n\tOriginalContent: type={original}\r\n".encode()
            )
            body = b"".join(
                (
                    _BOUNDARY,
                    head,
                    _BOUNDARY,
                    b"\r\n\tContent-Type: application/octet-stream\r\n",
                    struct.pack("<I", len(wrapped.header)),
                    wrapped.header,
                    wrapped.data,
                    _BOUNDARY,
                    b"--\r\n",
                )
            )
            kind = f'multipart/encrypted;protocol="{_SPNEGO}";boundary="Encrypted Boundary"'
        self._reply(status, body=body, kind=kind)

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    @staticmethod
    def _is_identify(root: Element) -> bool:
        return root.find(f"{{{SOAP}}}Body/{{{IDENTITY}}}Identify") is not None

    def _identify(self, body: bytes) -> None:
        """[MS-WSMV] 3.1.4.1.23, without authentication."""
        try:
            asked = self._is_identify(parse_xml(body))
        except ValueError:
            asked = False
        if asked:
            self._send(200, self._identity(authenticated=False), sealed=False)
        else:
            self._refuse()

    def _identity(self, *, authenticated: bool) -> bytes:
        version = (
            "OS: 0.0.0 SP: 0.0 Stack: 3.0" if authenticated else "OS: 0.0.0 SP: 0.0 Stack: 0.0"
        )
        return (
            f'<s:Envelope xml:lang="en-US" xmlns:s={quoteattr(SOAP)}><s:Header/><s:Body>'
            f"<wsmid:IdentifyResponse xmlns:wsmid={quoteattr(IDENTITY)}>"
            "<wsmid:ProtocolVersion>http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd</wsmid:ProtocolVersion>"
            "<wsmid:ProductVendor>pytest-kdriver</wsmid:ProductVendor>"
            f"<wsmid:ProductVersion>{version}</wsmid:ProductVersion>"
            "</wsmid:IdentifyResponse></s:Body></s:Envelope>"
        ).encode()

    def _reply(
        self,
        status: int,
        *,
        body: bytes = b"",
        kind: str | None = None,
        schemes: Sequence[str] = (),
        close: bool = False,
    ) -> None:
        self.send_response(status)
        if self._challenge:
            schemes = [f"Negotiate {self._challenge}"]
        for scheme in schemes:
            self.send_header("WWW-Authenticate", scheme)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)


def take_listeners() -> dict[int, socket.socket]:
    """What the service manager listens at for us, by port: sd_listen_fds(3)."""
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        count = 0
    found = [socket.socket(fileno=number) for number in range(3, 3 + count)]
    return {listener.getsockname()[1]: listener for listener in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, and end what was started."""
    options = _parse(arguments)
    listeners = take_listeners()
    try:
        users = read_users(options.users)
        bindings = tls = None
        if options.https is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            tls.load_cert_chain(options.certificate, options.key)
            bindings = bindings_of(options.certificate)
    except (OSError, ValueError) as error:
        print(f"wsman: {error}", file=sys.stderr)
        return 2
    offer_to_ntlm(users)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    service = Service(max_envelope=options.max_envelope_kb * 1024, mangle=options.mangle)
    servers: dict[str, Server] = {}
    if options.http is not None:
        servers["http"] = Server(
            (options.address, options.http),
            service,
            users,
            tls=None,
            bindings=None,
            basic=options.basic_over_http,
            listener=listeners.get(options.http),
        )
    if options.https is not None:
        servers["https"] = Server(
            (options.address, options.https),
            service,
            users,
            tls=tls,
            bindings=bindings,
            basic=True,
            listener=listeners.get(options.https),
        )
    for name, server in servers.items():
        threading.Thread(
            target=server.serve_forever, args=(0.1,), name=f"wsman-{name}", daemon=True
        ).start()
    ports = " ".join(f"{name}={server.server_address[1]}" for name, server in servers.items())
    print(f"ready {ports}", flush=True)
    while not ended.wait(5.0):
        service.sweep()
    for server in servers.values():
        server.shutdown()
        server.server_close()
    service.close()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A WS-Management endpoint with a command shell")
    parser.add_argument("--users", type=Path, required=True, help="lines of user:password")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--http", type=int, metavar="PORT")
    parser.add_argument("--https", type=int, metavar="PORT")
    parser.add_argument("--certificate", type=Path, metavar="PEM")
    parser.add_argument("--key", type=Path, metavar="PEM")
    parser.add_argument("--max-envelope-kb", type=int, default=500)
    parser.add_argument("--mangle", action="store_true", help="a code page for stdout")
    parser.add_argument("--basic-over-http", action="store_true")
    options = parser.parse_args(arguments)
    if options.http is None and options.https is None:
        parser.error("--http or --https is needed")
    if options.https is not None and not (options.certificate and options.key):
        parser.error("--https needs --certificate and --key")
    if options.max_envelope_kb < 32:
        parser.error("--max-envelope-kb is 32 at least")
    return options


if __name__ == "__main__":
    sys.exit(main())
