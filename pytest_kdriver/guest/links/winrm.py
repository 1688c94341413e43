"""An agent that a WinRM server starts for us, over its standard input and output."""

from __future__ import annotations

import binascii
import contextlib
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.outbox import Outbox
from pytest_kdriver.guest.words import words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from pytest_kdriver.guest.links import wsman

CLOSE_TIMEOUT: Final = 5.0
"""How long, in seconds, a link may take to be closed. The agent has most of it to end after its input did."""

POLL: Final = 20.0
"""How long, in seconds, the server waits for output before it says that there was none."""

HOLD: Final = 60.0
"""How long, in seconds, the server may hold what was sent because the agent does not read.

It is Windows' own limit for an operation (MaxTimeoutms). Behind it nobody knows what was written."""

_GRACE = 2.0
"""How long, in seconds, the last words of an agent may take when its input is gone already."""

_LAST_WORDS = 2000
"""How many bytes of what the agent writes to its standard error are kept."""

_LONGEST_LINE = 4 << 20
"""The most bytes of a line of base64 before it counts as broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinrmConfig:
    """Where to, and who we are.

    ``port`` None is 5986 for HTTPS, 5985 for HTTP. ``ca`` is a file of certificates that are trusted, None
    the system's; a server's certificate is always checked. Over HTTP each message is encrypted by NTLM.
    ``basic`` is HTTP's Basic authentication, for HTTPS: over HTTP it shows the password to the network, and
    needs ``allow_basic_over_http``, too. A proxy is never used, whatever the environment says: NTLM belongs
    to one connection.
    """

    host: str
    port: int | None = None
    user: str
    password: str = field(repr=False)
    https: bool = True
    ca: Path | None = None
    basic: bool = False
    allow_basic_over_http: bool = False

    @property
    def effective_port(self) -> int:
        """The port that is meant."""
        return self.port or (5986 if self.https else 5985)


class WinrmServerDown(LinkError):
    """Nobody listens there, or hangs up before a word: the machine may be on its way up."""


class WinrmLink:
    """A ``Link`` to a program that a WinRM server starts, by pywinrm.

    One connection sends, another one asks for output. What is given to ``send`` is handed to a thread, one
    envelope at a time; what the server did with it is known only when it answers. Nothing is sent or asked
    for twice, since it might be done twice: a connection that is lost is the end of the stream.

    With ``base64`` each chunk is a line of base64 in both directions, for servers that change bytes: the
    program must speak the same.

    ``LinkError`` if the server can't be reached, does not show a trusted certificate, does not let us in or
    does not start the command; ``TimeoutError`` if all that takes more than ``timeout`` seconds.
    """

    def __init__(
        self,
        config: WinrmConfig,
        command: str,
        *,
        timeout: float,
        close_timeout: float = CLOSE_TIMEOUT,
        base64: bool = False,
    ) -> None:
        self._wsman = _import_wsman()
        self._config = config
        self._close_timeout = close_timeout
        self._lines = _Lines() if base64 else None
        self._last_words = b""
        self._changed = threading.Condition()
        self._pending = bytearray()  # this and what follows belong to the condition
        self._busy = False
        self._unsendable: str | None = None
        self._ended: str | None = None
        self._closed = False
        self._given_up = False
        self._outbox = Outbox(self._write)
        self._receiving = threading.Lock()
        self._closing = threading.Lock()
        _check(config)
        self._sender, self._shell, self._command = self._connect(command, timeout)
        self._payload = self._sender.payload
        self._receiver: wsman.Session = self._wsman.Session(config)
        self._receiver.envelope = self._sender.envelope
        self._thread = threading.Thread(
            target=self._send_pending, name="kdriver-winrm-send", daemon=True
        )
        self._thread.start()

    def _connect(self, command: str, timeout: float) -> tuple[wsman.Session, str, str]:
        """Say who we are, open a shell, and start the command."""
        where = f"WinRM server {self._config.host}:{self._config.effective_port}"
        deadline = time.monotonic() + timeout
        session: wsman.Session = self._wsman.Session(self._config)
        doing, shell = "let us in", None
        try:
            with self._wsman.cut_at(session.line, deadline):
                session.within(timeout)
                session.envelope = session.ask_envelope()
                doing = "open a shell"
                shell = session.open()
                doing = "start the agent"
                started = session.start(shell, command)
        except BaseException as error:
            session.line.mend()
            if shell is not None:
                with self._wsman.cut_at(session.line, time.monotonic() + _GRACE):
                    _delete(session.within(_GRACE), shell)
            session.close()
            if not isinstance(error, Exception):
                raise
            # "from None", for a report of pytest's shows what functions were called with: the password.
            if self._wsman.never_connected(error):
                patience = min(timeout, self._wsman.CONNECT_TIMEOUT)
                raise TimeoutError(
                    f"the {where} did not take the connection within {patience:g} s{_FIREWALL}"
                ) from None
            if time.monotonic() >= deadline or self._wsman.took_too_long(error):
                raise TimeoutError(f"the {where} did not {doing} within {timeout:g} s") from None
            told = self._wsman.explain(error, self._config)
            is_down = doing == "let us in" and self._wsman.is_down(error)
            kind = WinrmServerDown if is_down else LinkError
            raise kind(f"the {where} did not {doing}: {told}") from None
        return session, shell, started

    @property
    def ended(self) -> str | None:
        """See ``Link.ended``."""
        return self._ended

    def send(self, data: bytes, timeout: float) -> None:
        """See ``Link.send``."""
        self._outbox.send(data, timeout)

    def _write(self, data: bytes, deadline: float) -> bytes:
        """Hand over to the thread what it has room for, until all is or the time is up; the rest."""
        rest = memoryview(data)
        with self._changed:
            while rest:
                self._changed.wait_for(
                    lambda: self._why_not() is not None or len(self._pending) < self._payload,
                    max(0.0, deadline - time.monotonic()),
                )
                why_not = self._why_not()
                if why_not is not None:
                    raise LinkError(why_not)
                room = self._payload - len(self._pending)
                if room <= 0:
                    break
                self._pending += rest[:room]
                rest = rest[room:]
                self._changed.notify_all()
        return bytes(rest)

    def _why_not(self) -> str | None:
        """Why nothing can be sent; None if it can."""
        if self._closed:
            return "the link is closed"
        gone = self._ended or self._unsendable
        return None if gone is None else f"the agent is gone: {gone}"

    def _send_pending(self) -> None:
        while (chunk := self._take_pending()) is not None:
            try:
                self._send_chunk(chunk)
            except Exception as error:  # of pywinrm's, requests', urllib3's, spnego's
                self._stop_sending(f"what was sent is lost: {self._explain(error)}")
                return

    def _take_pending(self) -> bytes | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pending or self._why_not() is not None)
            if not self._pending or self._ended or self._given_up:
                return None
            chunk = bytes(self._pending)
            self._pending.clear()
            self._busy = True
            self._changed.notify_all()
            return chunk

    def _send_chunk(self, chunk: bytes) -> None:
        size = self._payload if self._lines is None else self._payload // 4 * 3 - 1
        for start in range(0, len(chunk), size):
            part = chunk[start : start + size]
            if self._lines is not None:
                part = binascii.b2a_base64(part)
            self._sender.within(HOLD).send_input(self._shell, self._command, part)

    def _stop_sending(self, why: str) -> None:
        """Let the agent say its last words, if it has any, and end the stream."""
        with self._changed:
            self._unsendable = why
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended is not None or self._closed, _GRACE)
            self._ended = self._ended or why
        self._receiver.line.cut()

    def receive(self) -> bytes:
        """See ``Link.receive``."""
        with self._receiving:
            while not (self._closed or self._ended):
                try:
                    output = self._receiver.within(POLL).receive_output(self._shell, self._command)
                    data = output.stdout
                    if self._lines is not None:
                        data = self._lines.decode(data)
                except self._wsman.OperationTimeout:
                    continue
                except Exception as error:  # as above
                    if not self._closed:
                        self._end(self._explain(error))
                    break
                except BaseException:
                    self._end("it was interrupted while it told something")
                    raise
                self._last_words = (self._last_words + output.stderr)[-_LAST_WORDS:]
                if self._closed:
                    break
                if output.is_over:
                    self._end(self._tell_end(output.exit_code))
                if data:
                    return data
            return b""

    def _tell_end(self, exit_code: int | None) -> str:
        if exit_code is None:
            return "it closed its output"
        said = words(self._last_words.decode(errors="replace").strip())
        return f"it ended with exit code {exit_code}" + (f" and said: {said}" if said else "")

    def _end(self, why: str) -> None:
        with self._changed:
            self._ended = self._ended or why
            self._changed.notify_all()

    def _explain(self, error: Exception) -> str:
        if isinstance(error, LinkError):
            return str(error)
        if self._wsman.nobody_listens(error):  # as between two requests there may be no connection
            return "the connection was lost: nobody listens there any more"
        told: str = self._wsman.explain(error, self._config)
        return told

    def close(self) -> None:
        """See ``Link.close``. The agent's input ends first; an agent that stays is terminated."""
        with self._closing:
            if self._closed:
                return
            deadline = time.monotonic() + self._close_timeout
            until = deadline - min(1.0, self._close_timeout / 2)
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._receiver.line.cut()
            self._stop_thread(until)
            with self._outbox.lock, self._receiving:
                self._receiver.close()
            with self._wsman.cut_at(self._sender.line, deadline):
                self._end_agent(until, deadline)
            self._sender.close()

    def _stop_thread(self, until: float) -> None:
        """Let what was handed over be sent, but not for ever."""
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._pending or self._busy) or self._ended or self._unsendable,
                max(0.0, until - time.monotonic()),
            )
            self._given_up = True
            self._changed.notify_all()
            busy = self._busy
        if busy:
            self._sender.line.cut()
        self._thread.join()
        if busy:
            self._sender.line.mend()
            self._sender.forget()

    def _end_agent(self, until: float, deadline: float) -> None:
        """End its input, wait for its end, then delete the shell with whatever is in it."""
        session = self._sender
        is_over = self._ended is not None
        try:
            if not is_over:
                session.within(until - time.monotonic()).send_input(
                    self._shell, self._command, b"", end=True
                )
            while not is_over and (left := until - time.monotonic()) > 0:
                is_over = session.within(left).receive_output(self._shell, self._command).is_over
        except self._wsman.OperationTimeout:
            pass
        except Exception:  # whatever it was, the shell is deleted with all that is in it
            session.forget()
        session.within(deadline - time.monotonic())
        with contextlib.suppress(Exception):
            session.cleanup_command(self._shell, self._command)
        _delete(session, self._shell)


class _Lines:
    """Lines of base64, as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, data: bytes) -> bytes:
        """The bytes of the lines that are whole. ``LinkError`` for a line that is no base64."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise LinkError("it sends a line of base64 without an end")
        try:
            return b"".join(
                binascii.a2b_base64(line.rstrip(b"\r"), strict_mode=True) for line in lines
            )
        except binascii.Error as error:
            raise LinkError(f"it sends a line that is no base64 ({error})") from None


BYTE_VALUES: Final = bytes((ord("B") + place) % 256 for place in range(256))
"""What goes there and back first. ``check_bytes`` of kdagent's ``end.rs`` has the same."""


def open_agent(config: WinrmConfig, command: str, *, timeout: float) -> WinrmLink:
    """A link to the agent that ``command`` starts there, which gets kdagent's options behind it.

    All byte values go there and back first. Where they are changed, the agent is started anew, and lines of
    base64 are spoken. Errors are those of ``WinrmLink``; ``LinkError`` also where the agent ends at once.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as unless_good:
        link = WinrmLink(config, f"{command} --check-bytes", timeout=timeout)
        unless_good.callback(link.close)
        with closed_at(link, deadline, f"the agent did not answer within {timeout:g} s"):
            if _passes_all_bytes(link, deadline):
                unless_good.pop_all()
                return link
    left = max(deadline - time.monotonic(), 0.1)
    return WinrmLink(config, f"{command} --base64", timeout=left, base64=True)


def _passes_all_bytes(link: WinrmLink, deadline: float) -> bool:
    link.send(BYTE_VALUES, deadline - time.monotonic())
    received = b""
    while len(received) < len(BYTE_VALUES) and BYTE_VALUES.startswith(received):
        received += receive_more(link, "the agent")
    return received == BYTE_VALUES


def receive_more(link: WinrmLink, sender: str) -> bytes:
    """What comes next; ``LinkError`` at the end of the stream."""
    data = link.receive()
    if not data:
        raise LinkError(f"{sender} is gone: {link.ended or 'the link is closed'}")
    return data


@contextlib.contextmanager
def closed_at(link: WinrmLink, deadline: float, told: str) -> Iterator[None]:
    """Close the link at the deadline. A ``LinkError`` of then is a ``TimeoutError`` that says ``told``."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        link.close()

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.name = "kdriver-winrm-deadline"
    timer.daemon = True
    timer.start()
    try:
        yield
    except LinkError:
        if is_late.is_set():
            raise TimeoutError(told) from None
        raise
    finally:
        timer.cancel()
        timer.join()


_FIREWALL = (
    ": is the machine up, is WinRM set up there, and does the firewall let us in? "
    "Where the network's profile is Public, Windows' does not (0x80338169)"
)


def _check(config: WinrmConfig) -> None:
    """``LinkError`` for what can't be, before anything is sent."""
    if not config.user or not config.password:
        raise LinkError("a target that is reached by WinRM needs a user and a password")
    if config.basic and not config.https and not config.allow_basic_over_http:
        raise LinkError(
            "Basic authentication over HTTP would show the password to the network: use HTTPS, or NTLM, "
            "or set allow_basic_over_http where the network is your own"
        )
    if config.ca is not None and not config.ca.is_file():
        raise LinkError(f"the CA file {config.ca} is not there")


def _delete(session: wsman.Session, shell: str) -> None:
    with contextlib.suppress(Exception):
        session.close_shell(shell, close_session=False)


def _import_wsman() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what its libraries are about to drop
            from pytest_kdriver.guest.links import wsman
    except ImportError as error:
        raise LinkError(
            f"a target that is reached by WinRM needs pywinrm ({error}): pip install 'pytest-kdriver[winrm]'"
        ) from error
    return wsman
