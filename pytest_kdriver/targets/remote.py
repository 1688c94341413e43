r"""An existing machine, with Windows on it, as a target's machine.

It is nobody's clone: it was there before, and stays. So there is nothing to put it back with, and it has one
run at a time. Not verified on Windows.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

from pytest_kdriver.config import TargetConfig, password_variable
from pytest_kdriver.errors import AgentError, KdriverError, LinkError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.guest.links import powershell, ssh
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.ssh import SshConfig, SshLink, SshServerDown
from pytest_kdriver.guest.links.winrm import WinrmConfig, WinrmServerDown, open_agent
from pytest_kdriver.image.preflight import Report, preflight
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.remote_config import AGENT_PLACE, RemoteConfig, Via
from pytest_kdriver.targets.machine import FOLDER, Guest, Installed
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.telling import tell
from pytest_kdriver.win32error import Win32Error

CAPABILITIES: Final = frozenset({"programs", "pool"})

ATTEMPT: Final = 10.0
"""Seconds that one attempt to reach the machine may take at first; the next after one that was cut off may
take twice as long."""

RETRY: Final = 1.0
"""Seconds at most between two attempts; how many is chance, so that two runs do not keep step."""

CLEAN_TIMEOUT: Final = 5.0
"""Seconds for each thing that is removed at the end."""

_AGENT_NAME: Final = re.compile(r"-[0-9a-f]{16}\.exe$", re.IGNORECASE)
"""What stands behind the agent's own name, in the file that is its own for each content."""


_STOPPED: Final = (Win32Error.ERROR_SUCCESS, Win32Error.ERROR_SERVICE_NOT_ACTIVE)


class Way(Protocol):
    """How the agent gets to a machine, and how it is started there."""

    def describe(self) -> str:
        """Where the machine is, and by what it is reached."""
        ...

    def place_agent(self, content: bytes, path: str, timeout: float) -> None:
        """See to it that the machine's file ``path`` has ``content``. Errors are those of ``open``."""
        ...

    def open(self, path: str, timeout: float) -> Link:
        """A link to an agent that is started from ``path``.

        Raises ``LinkError``, ``TimeoutError``; ``NotUpError`` where the machine may be on its way up.
        """
        ...


class NotUpError(LinkError):
    """Nobody is there to talk to, yet."""


class SshWay:
    """See ``Way``: by SFTP, and by a command of the SSH server's."""

    def __init__(self, target: str, config: RemoteConfig) -> None:
        self._target = target
        self._config = config

    def describe(self) -> str:
        """See ``Way``."""
        return f"{_place(self._config)} by SSH"

    def place_agent(self, content: bytes, path: str, timeout: float) -> None:
        """See ``Way``."""
        with _waited_for():
            ssh.place_file(self._ssh(), content, sftp_path(path), timeout=timeout)

    def open(self, path: str, timeout: float) -> Link:
        """See ``Way``."""
        command = self._config.ssh_command.replace(AGENT_PLACE, path)
        with _waited_for():
            return SshLink(self._ssh(), command, timeout=timeout)

    def _ssh(self) -> SshConfig:
        config = self._config
        return SshConfig(
            host=config.host,
            port=config.port or ssh.STANDARD_PORT,
            user=config.user,
            key=config.ssh_key,
            password=os.environ.get(password_variable(self._target)),
            known_hosts=config.ssh_known_hosts,
        )


class WinrmWay:
    """See ``Way``: by PowerShell, and by a command in a shell of WinRM's."""

    def __init__(self, target: str, config: RemoteConfig) -> None:
        self._target = target
        self._config = config

    def describe(self) -> str:
        """See ``Way``."""
        return f"{_place(self._config)} by WinRM"

    def place_agent(self, content: bytes, path: str, timeout: float) -> None:
        """See ``Way``."""
        with _waited_for():
            powershell.place_file(self._winrm(), content, path, timeout=timeout)

    def open(self, path: str, timeout: float) -> Link:
        """See ``Way``."""
        command = self._config.winrm_command.replace(AGENT_PLACE, path)
        with _waited_for():
            return open_agent(self._winrm(), command, timeout=timeout)

    def _winrm(self) -> WinrmConfig:
        config = self._config
        variable = password_variable(self._target)
        if variable not in os.environ:
            raise LinkError(f"WinRM needs a password: put it into the environment as {variable}")
        return WinrmConfig(
            host=config.host,
            port=config.port,
            user=config.user,
            password=os.environ[variable],
            https=config.https,
            ca=config.ca,
            basic=config.basic,
        )


_WAYS: Final[Mapping[Via, Callable[[str, RemoteConfig], Way]]] = {"ssh": SshWay, "winrm": WinrmWay}


class RemoteMachine:
    """See ``LastingMachine``; ``config`` says which. ``way`` is how it is reached, else as it says."""

    def __init__(self, config: TargetConfig, *, way: Way | None = None) -> None:
        assert config.remote is not None
        self._target = config.name
        self._config = config.remote
        self._way = way or _WAYS[config.remote.via](config.name, config.remote)
        self.capabilities = CAPABILITIES - config.without
        self._agent: Agent | None = None
        self._former: set[int] = set()
        """The process ids of agents that we had there, and whose links broke."""

    def describe(self) -> str:
        """See ``Machine``."""
        if self._agent is None:
            return self._way.describe()
        info = self._agent.info
        version = ".".join(map(str, info.os_version))
        system = f"Wine {info.wine_version}" if info.wine_version else f"Windows {version}"
        return f"{system} on {self._way.describe()}"

    # its life

    def boot(self, run: Run, log: KernelLog, generation: int) -> Guest:  # noqa: ARG002
        """See ``Machine``. It is reached; nothing is booted."""
        agent = self._reach(time.monotonic() + self._config.timeout)
        return Guest(agent, None)

    def reach_again(self) -> Guest | None:
        """See ``LastingMachine``."""
        with suppress(KdriverError, OSError):
            return Guest(self._reach(time.monotonic() + ATTEMPT), None)
        return None

    def _reach(self, deadline: float) -> Agent:
        content = AGENT.executable().read_bytes()
        path = agent_path(self._config.agent_path, content)
        limit = ATTEMPT
        in_use: _InUseError | None = None
        while True:
            began = time.monotonic()
            attempt = min(limit, max(deadline - began, 0.1))
            try:
                self._way.place_agent(content, path, attempt)
                agent = Agent.connect(self._way.open(path, attempt), timeout=attempt)
                try:
                    self._have_it_alone(agent, path)
                except BaseException:
                    self._former.add(agent.info.pid)
                    agent.close()
                    raise
            except (TimeoutError, LinkError, _InUseError) as error:
                in_use = error if isinstance(error, _InUseError) else in_use
                refused = isinstance(error, LinkError) and not isinstance(error, NotUpError)
                if refused or time.monotonic() >= deadline:
                    raise self._unreached(in_use or error) from None
                if isinstance(error, TimeoutError):
                    limit *= 2
                time.sleep(min(random.uniform(0.2, RETRY), max(deadline - time.monotonic(), 0.0)))  # noqa: S311
            else:
                self._agent = agent
                return agent

    def _have_it_alone(self, agent: Agent, path: str) -> None:
        """See that no other run has an agent there; of two that come at once at most one stays.

        Each looks after its own agent has started, so one of them at least sees the other. Our own agents,
        whose links broke, are ended.
        """
        name = re.split(r"[\\/]", path)[-1]
        stem = _AGENT_NAME.sub("", name).lower()
        others = [
            process
            for process in agent.processes(timeout=CLEAN_TIMEOUT)
            if process.pid != agent.info.pid
            and _AGENT_NAME.search(process.name)
            and _AGENT_NAME.sub("", process.name).lower() == stem
        ]
        self._former &= {process.pid for process in others}  # the others may be anybody's by now
        for pid in self._former:
            with suppress(AgentError):  # it ended meanwhile
                agent.terminate(pid, timeout=CLEAN_TIMEOUT)
        strangers = [process for process in others if process.pid not in self._former]
        if strangers:
            name, pid = strangers[0].name, strangers[0].pid
            raise _InUseError(
                f"another run has it: {name} runs there, as process {pid}. A remote machine takes one run, "
                "and one worker of pytest-xdist, at a time; an agent that nobody has any more is ended "
                f"there by taskkill /f /pid {pid}"
            )

    def _unreached(self, error: Exception) -> TargetError:
        told = str(error)
        if isinstance(error, TimeoutError):
            told += "; a machine that needs longer gets it by timeout in its config"
        return TargetError(told, target=self._target)

    def save(self, guest: Guest) -> Guest:
        """See ``Machine``. There is nothing to save it with."""
        return guest

    def revert(self, guest: Guest, log: KernelLog) -> Guest | None:  # noqa: ARG002
        """See ``Machine``."""
        return None

    def failure(self) -> str | None:
        """See ``Machine``. Nobody but the agent can tell."""
        return None

    def keep(self, guest: Guest) -> str | None:  # noqa: ARG002
        """See ``Machine``. It stays in any case, and what was installed is removed."""
        return None

    def check(self, guest: Guest) -> None:
        """See ``Machine``."""
        if not guest.agent.info.elevated:
            raise TargetError(
                f"the user {self._config.user} is no administrator there, or has no elevated token: drivers "
                "are loaded by administrators alone. Name another user",
                target=self._target,
            )

    def catch_up(self, guest: Guest) -> bool:  # noqa: ARG002
        """See ``Machine``. There is no kernel log."""
        return False

    def examine_hang(self, guest: Guest) -> None:
        """See ``Machine``. There is no kernel log."""

    def evidence(self) -> Mapping[str, Callable[[Path], None]]:
        """See ``Machine``. It has no screen that we see."""
        return {}

    def let_dump(self, guest: Guest) -> Guest | None:  # noqa: ARG002
        """See ``Machine``."""
        return None

    def preflight(self, image: Path) -> Report:
        """See ``Machine``. The guest's kernel is not looked into."""
        on_wine = self._agent is not None and self._agent.info.wine_version is not None
        return preflight(image, None, guest="wine" if on_wine else "windows")

    def clean(self, guest: Guest, installed: Installed) -> list[str]:
        """See ``LastingMachine``."""
        agent, stays = guest.agent, []

        def attempt(what: str, remove: Callable[[], object]) -> bool:
            try:
                remove()
            except (AgentError, LinkError, TimeoutError) as error:
                stays.append(f"{what} ({error})")
                return False
            return True

        for service in list(installed.services):

            def remove_service(service: str = service) -> None:
                if not _is_ours(agent, service):
                    return
                code = agent.stop_service(service, timeout=CLEAN_TIMEOUT)
                agent.delete_service(service, timeout=CLEAN_TIMEOUT)
                if code not in _STOPPED:
                    raise AgentError("its driver could not be stopped", code=code)

            if attempt(f"service {service}", remove_service):
                installed.services.discard(service)
        for file in list(installed.files):

            def remove_file(file: str = file) -> None:
                if agent.hash(file, timeout=CLEAN_TIMEOUT) is not None:
                    agent.delete(file, timeout=CLEAN_TIMEOUT)
                folder = file.rpartition("\\")[0]  # only if it is empty
                agent.run(["cmd.exe", "/c", "rmdir", folder], time_limit=CLEAN_TIMEOUT)

            if attempt(file, remove_file):
                installed.files.discard(file)
        return stays

    def tell(self, text: str) -> None:
        """See ``LastingMachine``."""
        tell(f"target {self._target}: {text}")

    def end(self) -> None:
        """See ``Machine``. The agent ends; the machine stays."""
        agent, self._agent = self._agent, None
        if agent is not None:
            self._former.add(agent.info.pid)
            agent.close()


def _is_ours(agent: Agent, service: str) -> bool:
    """Whether there is such a service, and its image is one that a run has put there."""
    if agent.query_service(service, timeout=CLEAN_TIMEOUT) is None:
        return False
    key = f"SYSTEM\\CurrentControlSet\\Services\\{service}"
    image = agent.get_value(key, "ImagePath", timeout=CLEAN_TIMEOUT)
    return isinstance(image, str) and f"{FOLDER}\\".lower() in image.lower()


class _InUseError(Exception):
    """Another run has the machine; the message says so."""


@contextmanager
def _waited_for() -> Iterator[None]:
    """Tell a server that may be on its way up from one that says no."""
    try:
        yield
    except (SshServerDown, WinrmServerDown) as error:
        raise NotUpError(str(error)) from None


def _place(config: RemoteConfig) -> str:
    """The host, and the port if one was set."""
    return config.host if config.port is None else f"{config.host}:{config.port}"


def agent_path(path: str, content: bytes) -> str:
    """Where the agent with this content belongs: a name of its own, which no other content has."""
    return f"{path[:-4]}-{hashlib.sha256(content).hexdigest()[:16]}.exe"


def sftp_path(path: str) -> str:
    r"""``path`` as SFTP has it.

    OpenSSH for Windows has ``/C:/folder`` for ``C:\folder`` (curl's pull request 5298, and issue 48 of
    PowerShell/Win32-OpenSSH).
    """
    return "/" + path.replace("\\", "/") if path[1:2] == ":" else path
