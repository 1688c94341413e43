"""A target that is made of a machine, an agent and a loader: what all kinds have in common."""

from __future__ import annotations

import errno
import hashlib
import io
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import AgentError, ConfigError, KdriverError, LinkError, TargetError
from pytest_kdriver.guest.agent import Agent, IoOutcome
from pytest_kdriver.image.authenticode import read_signature
from pytest_kdriver.image.pe import ImageLayout, read_image, read_layout
from pytest_kdriver.image.preflight import Report
from pytest_kdriver.image.signing import NotSigned, SignatureError, signed_copy
from pytest_kdriver.kernel.dump import parse_dump
from pytest_kdriver.kernel.events import BugCheck, Fence, ImageUnloaded, KernelMessage, Moment
from pytest_kdriver.kernel.log import KernelLog, Window
from pytest_kdriver.kernel.text import LAST_LINES, kernel_lines
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.leftovers import REMOVERS, SPILL, remove_file
from pytest_kdriver.targets.loader import SERVICES_GONE, Loader
from pytest_kdriver.targets.machine import (
    FOLDER,
    Guest,
    Installed,
    LastingMachine,
    LogFeed,
    Machine,
)
from pytest_kdriver.targets.nt_loader import NtLoader
from pytest_kdriver.targets.pool_sampling import PoolSampling, tells_pool
from pytest_kdriver.targets.refusals import in_words
from pytest_kdriver.targets.runs import Run, collect_garbage
from pytest_kdriver.targets.target import CallTimeout, Io, LoadOutcome, ParameterValue
from pytest_kdriver.targets.windows.dumps import fetch_minidump
from pytest_kdriver.targets.windows.exact_status import assert_exact_status
from pytest_kdriver.targets.windows.in_force import Fact, NotInForce, assert_in_force
from pytest_kdriver.targets.wine_loader import WineLoader
from pytest_kdriver.telling import tell
from pytest_kdriver.win32error import Win32Error

START_TIMEOUT: Final = 60.0
"""Seconds for the agent and the service manager of a guest that is up to answer: under one when idle, many
on a busy machine."""

START_ATTEMPTS: Final = 3
"""On a busy machine services.exe was seen, once in hundreds of starts, to be gone before it served."""

FENCE_TIMEOUT: Final = 30.0
_AGENT_GONE: Final = "its agent is gone"


class MachineTarget:
    """See ``Target``. ``artifacts`` is where the kernel log's old events go.

    ``asserts`` may be taken back by who only looks: then a Windows is started that is not as tests need it.
    """

    def __init__(self, name: str, machine: Machine, *, artifacts: Path | None = None) -> None:
        self.name = name
        self.machine = machine
        self.capabilities = machine.capabilities
        self.generation = 0
        self.crashes_told_to = 0
        self._artifacts = artifacts
        self._run: Run | None = None
        self._spill = Path()
        self._log: KernelLog | None = None
        self._guest: Guest | None = None
        self._loader: Loader | None = None
        self._pool_sampling: PoolSampling | None = None
        self._broken: str | None = None
        self._minidump: bytes | None = None
        self._begin = 0
        """The log's position at the begin of this generation."""
        self._touched = False
        self._layouts: dict[str, ImageLayout] = {}
        self._installed = Installed()
        self.asserts = True
        self._not_in_force: list[Fact] = []
        self._status_tried = False
        self._inexact_status: list[Fact] = []
        self._told: set[str] = set()

    # the guest

    @property
    def log(self) -> KernelLog:
        """See ``Target``. Raises ``TargetError`` before the first start."""
        if self._log is None:
            raise TargetError("it was not started", target=self.name)
        return self._log

    @property
    def agent(self) -> Agent:
        """See ``Target``."""
        agent = self.guest.agent
        self._touched = True
        return agent

    @property
    def guest(self) -> Guest:
        """The guest of this generation. Raises ``TargetError`` where none is running."""
        if self._guest is None:
            raise TargetError("it is not running", target=self.name)
        return self._guest

    @property
    def sees_kernel(self) -> bool:
        """See ``Surroundings``."""
        return self.guest.feed is not None

    def describe(self) -> str:
        """See ``Target``."""
        told = self.machine.describe()
        if not self._lacking:
            return told
        return f"{told}; not in force there: " + ", ".join(
            f"{fact.name} ({fact.found})" for fact in self._lacking
        )

    def describe_feed(self) -> str:
        """See ``Target``."""
        feed = self._guest.feed if self._guest is not None else None
        return feed.describe() if feed is not None else ""

    @property
    def _lacking(self) -> list[Fact]:
        """What a Windows has not in force, and no test suffers from."""
        return [*self._not_in_force, *self._inexact_status]

    def start(self) -> None:
        """See ``Target``."""
        attempts = 0
        while self._guest is None:
            attempts += 1
            try:
                self._start_once()
            except TargetError as error:
                came_up = self._guest is not None
                self._end_guest()
                in_vain = not came_up or isinstance(error, NotInForce)
                if in_vain or attempts == START_ATTEMPTS:
                    raise
            except BaseException:
                self._end_guest()
                raise

    def _start_once(self) -> None:
        with self._start_errors("it did not start"):
            if self._run is None:
                self._begin_run()
            assert self._run is not None
            self.generation += 1
            self._go_on_with(self.machine.boot(self._run, self.log, self.generation))
            self._verify()
            self._see_pool()
            self._clean()
            self._prove_status()
            self._tell_lacking()
            if "snapshots" in self.capabilities:
                self._go_on_with(self.machine.save(self.guest))

    def _begin_run(self) -> None:
        collect_garbage(REMOVERS)
        self._run = Run()
        if self._log is None:  # else the run before was kept
            self._spill = (self._artifacts or self._run.path) / f"{self._run.path.name}.events"
            self._run.record(SPILL, self._spill)
            self._log = KernelLog(self._spill)

    def _go_on_with(self, guest: Guest) -> None:
        self._guest = guest
        self._loader = WineLoader(self) if self._on_wine else NtLoader(self)
        self._pool_sampling = None if self._on_wine else PoolSampling(self)
        self._broken = None
        self._minidump = None
        self._begin = len(self.log)
        self._touched = False
        if not isinstance(self.machine, LastingMachine):
            self._installed = Installed()

    def _verify(self) -> None:
        """See that what tests rely on is there: kernel log, service manager, and what the machine knows."""
        self.fence()
        with self.agent_errors("start"):
            self.guest.agent.query_service("kdriver", timeout=START_TIMEOUT)
        self.machine.check(self.guest)
        if self.asserts and not self._on_wine:
            with self.agent_errors("start"):
                self._not_in_force = assert_in_force(
                    self.guest.agent, kernel_log=self.guest.feed is not None, target=self.name
                )

    def _see_pool(self) -> None:
        """See whether the pool can be seen: on Wine by its trace, elsewhere by the kernel's counters."""
        if "pool" not in self.capabilities:
            return
        with self.agent_errors("start"):
            guest = self.guest
            seen = guest.feed is not None if self._on_wine else tells_pool(guest.agent)
        if not seen:
            self.capabilities -= {"pool"}

    def _prove_status(self) -> None:
        """See, at the first start, that a Windows gives DriverEntry's status back.

        Wine's is read from its trace, which the tests of this package see to: there it would be a tenth of a
        start's time.
        """
        if self._on_wine or self._status_tried or not self.asserts:
            return
        assert self._run is not None
        self._inexact_status = assert_exact_status(self, self._run.path)
        self._status_tried = True
        self._touched = False

    def _tell_lacking(self) -> None:
        """Tell each thing once: pytest has named the target long before."""
        for fact in self._lacking:
            if fact.name not in self._told:
                tell(
                    f"target {self.name}: not in force there: {fact.name}, {fact.found}. {fact.mends}"
                )
                self._told.add(fact.name)

    @property
    def _on_wine(self) -> bool:
        return self.guest.agent.info.wine_version is not None

    @contextmanager
    def _start_errors(self, told: str) -> Iterator[None]:
        try:
            yield
        except (OSError, AgentError, LinkError, TimeoutError) as error:
            raise TargetError(f"{told}: {error}{_advice(error)}", target=self.name) from error

    def close(self) -> None:
        """See ``Target``."""
        with ExitStack() as last_to_first:
            run, self._run = self._run, None
            if run is not None:
                last_to_first.callback(run.close, REMOVERS)
                last_to_first.callback(remove_file, self._spill)
            if self._log is not None:
                last_to_first.callback(self._log.close)
            last_to_first.callback(self._clean_behind)
            self._end_guest()

    def _end_guest(self) -> None:
        """End the guest that the machine has, also one that we were not given yet."""
        try:
            if self._loader is not None:
                self._loader.close()
            self._clean()
        finally:
            self._guest = None
            self.machine.end()

    def _clean(self) -> list[str]:
        """Remove what is still installed, where the machine stays; what could not be, in words."""
        machine, guest = self.machine, self._guest
        if not self._installed or guest is None or guest.agent.closed:
            return []
        return machine.clean(guest, self._installed) if isinstance(machine, LastingMachine) else []

    def _clean_behind(self) -> None:
        """Remove at the very end what the last guest's agent could not; tell what stays."""
        machine = self.machine
        if not self._installed or not isinstance(machine, LastingMachine):
            return
        try:
            self._guest = machine.reach_again()
            stays = self._clean() if self._guest is not None else []
        finally:
            self._guest = None
            machine.end()
        if self._installed:
            names = sorted(self._installed.services | self._installed.files)
            machine.tell(f"this is left there: {'; '.join(stays or names)}")

    def keep(self) -> str | None:
        """See ``Target``."""
        guest, run = self._guest, self._run
        told = self.machine.keep(guest) if guest is not None else None
        if told is None or run is None:
            return None
        run.keep()
        if self._loader is not None:
            self._loader.close()
        self._guest = self._run = None
        return told

    @property
    def broken(self) -> str | None:
        """See ``Target``."""
        return self._broken

    def break_down(self, reason: str) -> None:
        """See ``Target``."""
        self._broken = self._broken or reason

    def repair(self) -> None:
        """See ``Target``."""
        untold = self._note_loss()
        if self._broken is not None:
            self._renew()
        self.start()
        if untold is not None:
            raise TargetError(untold, target=self.name)

    def see_through(self) -> None:
        """See ``Target``."""
        if (untold := self._note_loss()) is not None:
            raise TargetError(untold, target=self.name)

    def _note_loss(self) -> str | None:
        """Note that the guest is lost, where it is; what to tell of that, if nobody was told. None: nothing.

        A kernel may crash between two tests, a machine stop. Without a kernel log a lost agent between two
        calls of a test is all that is seen of a guest that went down with a driver.
        """
        if self._guest is None or not self._guest.agent.closed or self._broken is not None:
            return None
        failure = self.machine.failure()
        self.break_down(failure or _AGENT_GONE)
        installed = ", ".join(sorted(self._installed.services))
        if failure is None:
            if self._guest.feed is None and installed:
                return f"the connection was lost while {installed} was installed: {_AGENT_GONE}"
            return None
        images = self._seen.of(ImageUnloaded)
        unloaded = ", ".join(sorted({image.driver for image in images if FOLDER in image.path}))
        told = f"{failure}, when nobody called it"
        told += f"; installed: {installed}" if installed else ""
        told += f"; unloaded before: {unloaded}" if unloaded else ""
        lines = [f"\n    {line}" for line in kernel_lines(self._seen, LAST_LINES)]
        return told + "".join(["\nlast lines of the kernel log:", *lines] if lines else [])

    @property
    def _seen(self) -> Window:
        """What was seen in this generation."""
        return self.log.window(None, self._begin)

    def revert(self) -> None:
        """See ``Target``."""
        untold = self._note_loss()
        if self._touched or self._broken is not None:
            self._renew()
        self.start()
        if untold is not None:
            raise TargetError(untold, target=self.name)

    def _renew(self) -> None:
        if self._guest is None or not self._put_back(self._guest):
            self._end_guest()
            self.start()

    def _put_back(self, guest: Guest) -> bool:
        """Put the guest back as it is; False where it takes a new one."""
        if "snapshots" not in self.capabilities:
            return False
        if self._loader is not None:
            self._loader.close()
        try:
            with self._start_errors("it was not put back"):
                reverted = self.machine.revert(guest, self.log)
                if reverted is None:
                    return False
                self.generation += 1
                self._go_on_with(reverted)
                self._verify()
        except TargetError as error:
            told = f"the guest could not be put back, and is made anew: {error}"
            self.log.append([KernelMessage(time.monotonic(), None, told)])
            return False
        self._touched = False
        return True

    # the kernel log

    def fence(self) -> None:
        """See ``Target``. The agent says a word that the kernel log has to bring."""
        feed = self.guest.feed
        if feed is None:
            return
        if not feed.carries_words:
            self._catch_up()
            return
        position = len(self.log)
        cookie = uuid.uuid4().hex
        try:
            with self.agent_errors("fence"):
                self.guest.agent.fence(cookie, timeout=FENCE_TIMEOUT)
        except TimeoutError:
            seen = None
        else:
            seen = self.log.window(None, position).wait_for(
                lambda _, event: isinstance(event, Fence) and event.cookie == cookie,
                0.0 if feed.failure is not None else FENCE_TIMEOUT,
            )
            self._check_feed(feed)
        if seen is None:
            self.break_down("its kernel log does not flow")
            raise TargetError(
                f"its kernel log does not flow: the agent's word did not come in {FENCE_TIMEOUT:g} s",
                target=self.name,
            )

    def _catch_up(self) -> None:
        """Have the log hold what was printed up to now."""
        guest = self.guest
        if guest.feed is None:
            return
        try:
            caught_up = self.machine.catch_up(guest)
        except (LinkError, TimeoutError) as error:
            self.break_down("its kernel log does not flow")
            raise TargetError(f"its kernel log does not flow: {error}", target=self.name) from error
        if caught_up:
            self._check_feed(guest.feed)
        else:
            self.fence()

    def _check_feed(self, feed: LogFeed) -> None:
        if feed.failure is not None:
            self.break_down("its kernel log broke")
            raise TargetError(f"its kernel log broke: {feed.failure}", target=self.name)

    def examine_hang(self) -> None:
        """See ``Surroundings``."""
        try:
            self.machine.examine_hang(self.guest)
        except (TargetError, AgentError, LinkError, TimeoutError) as error:
            told = f"where the processors are can't be told: {error}"
            self.log.append([KernelMessage(time.monotonic(), None, told)])

    # what is left of a failed test

    def collect(self, stem: Path, *, dump: bool) -> list[str]:
        """See ``Target``."""
        if self._guest is None:
            return []
        missing = []
        for suffix, write in self.machine.evidence().items():
            try:
                write(stem.with_name(stem.name + suffix))
            except (TargetError, OSError) as error:
                missing.append(f"{suffix}: {error}")
        if dump and self._broken is not None:
            try:
                if (content := self._fetch_minidump()) is not None:
                    stem.with_name(f"{stem.name}.dmp").write_bytes(content)
            except (KdriverError, OSError, TimeoutError) as error:
                missing.append(f".dmp: {error}")
        return missing

    def _fetch_minidump(self) -> bytes | None:
        """The minidump of the crash that the guest stands behind; None where it can't write one."""
        if self._minidump is None and (guest := self.machine.let_dump(self.guest)) is not None:
            self._guest = guest
            self._minidump = fetch_minidump(guest.agent)
        return self._minidump

    def _ask_dump(self) -> None:
        """Have the log tell of a crash that nobody but the guest's dump tells of.

        A guest in which nothing was done yet is made anew sooner than it could tell.
        """
        if not self._touched or any(event.driver is None for event in self._seen.of(BugCheck)):
            return
        with suppress(KdriverError, OSError, TimeoutError):
            content = self._fetch_minidump()
            if content is not None:
                dump = parse_dump(io.BytesIO(content), "the guest's minidump")
                now = time.monotonic()
                self.log.append([BugCheck(now, None, dump.code, dump.parameters, stack=dump.stack)])

    # drivers

    def preflight(self, image: Path) -> Report:
        """See ``Target``."""
        return self.machine.preflight(self._for_guest(image))

    def _for_guest(self, image: Path) -> Path:
        """The file that the guest gets: a Windows takes none that nobody signed."""
        if self._on_wine or self._run is None:
            return image
        try:
            read_signature(read_image(image))
        except NotSigned:
            return signed_copy(image, self._run.path / "signed")
        except SignatureError:
            pass  # which pre-flight tells
        return image

    def install(
        self, service: str, image: Path, parameters: Mapping[str, ParameterValue], timeout: float
    ) -> None:
        """See ``Target``."""
        self._layouts[service] = read_layout(image)
        deadline = time.monotonic() + timeout
        agent = self.agent
        content = self._for_guest(image).read_bytes()
        sha256 = hashlib.sha256(content).digest()
        path = f"{FOLDER}\\{sha256.hex()[:16]}\\{service}.sys"
        key = f"SYSTEM\\CurrentControlSet\\Services\\{service}\\Parameters"
        with self.agent_errors("install"):
            self._installed.files.add(path)
            try:
                if agent.hash(path, timeout=_left(deadline)) != sha256:
                    agent.put(content, path, timeout=_left(deadline))
                self._register(service, path, deadline)
            except AgentError as error:
                if (refusal := in_words(error, service)) is None:
                    raise
                self.break_down(f"{service} could not be installed")
                raise TargetError(refusal, target=self.name) from error
            for name, value in parameters.items():
                agent.set_value(key, name, value, timeout=_left(deadline))

    def _register(self, service: str, path: str, deadline: float) -> None:
        """Register the service; one that a dead run left there goes first."""
        agent = self.agent
        try:
            agent.create_service(service, path, timeout=_left(deadline))
        except (LinkError, TimeoutError):
            self._installed.services.add(service)  # it may be there all the same
            raise
        except AgentError as error:
            if in_words(error, service) is not None:
                raise
            if agent.query_service(service, timeout=_left(deadline)) is None:
                raise
            if not self._remove_left(service, deadline):
                raise ConfigError(
                    f"target {self.name!r} has a service {service!r} already; "
                    "give this driver's another name, with service="
                ) from error
            agent.create_service(service, path, timeout=_left(deadline))
        self._installed.services.add(service)

    def _remove_left(self, service: str, deadline: float) -> bool:
        """Remove a service of a run that died; whether it was one, and is gone."""
        machine = self.machine
        if not isinstance(machine, LastingMachine) or service in self._installed.services:
            return False
        machine.clean(self.guest, Installed(services={service}))
        return self.agent.query_service(service, timeout=_left(deadline)) is None

    def uninstall(self, service: str, timeout: float) -> None:
        """See ``Target``."""
        with self.agent_errors("uninstall"):
            try:
                self.agent.delete_service(service, timeout=timeout)
            except AgentError as error:
                if (refusal := in_words(error, service)) is None:
                    raise
                self.break_down(f"{service} could not be unregistered")
                raise TargetError(refusal, target=self.name) from error
        self._installed.services.discard(service)

    def load(self, service: str, timeout: float) -> LoadOutcome:
        """See ``Target``."""
        return self._loaded_by.load(service, self._layouts[service], timeout)

    def load_by_service_manager(self, service: str, timeout: float) -> LoadOutcome:
        """See ``Target``."""
        return self._loaded_by.load_by_service_manager(service, self._layouts[service], timeout)

    @property
    def samples_pool(self) -> bool:
        """See ``Target``."""
        return self._pool_sampling is not None and "pool" in self.capabilities

    def sample_pool(self, service: str, tags: Collection[str], moment: Moment) -> None:
        """See ``Target``."""
        if self._pool_sampling is not None:
            self._pool_sampling.sample(service, tags, moment)

    def unload(self, service: str, timeout: float) -> NTSTATUS | Win32Error:
        """See ``Target``."""
        return self._loaded_by.unload(service, timeout)

    @property
    def _loaded_by(self) -> Loader:
        if self._loader is None:
            raise TargetError("it is not running", target=self.name)
        return self._loader

    def device_io(self, service: str, io: Callable[[Agent, float], Io], timeout: float) -> Io:
        """See ``Target``."""
        position = len(self.log)
        with self.agent_errors("device I/O"):
            try:
                result: Io | None = io(self.agent, timeout)
            except TimeoutError:
                result = None
        self._catch_up()
        if result is None or result.outcome is IoOutcome.STUCK:
            raise CallTimeout(self._loaded_by.cut_io(service))
        self._loaded_by.note_io(service, result.status, position)
        return result

    @contextmanager
    def agent_errors(self, phase: str) -> Iterator[None]:
        """See ``Surroundings``."""
        try:
            yield
        except LinkError as error:
            self.break_down(self._why_gone())
            self._ask_dump()
            told = f"{phase}: {error}"
            if failure := self.machine.failure():
                told += f"; {failure}"
            raise TargetError(told, target=self.name) from error
        except AgentError as error:
            if error.code not in SERVICES_GONE:
                raise
            raise self.services_gone(f"{phase}: {error}") from error

    def _why_gone(self) -> str:
        return self.machine.failure() or _AGENT_GONE

    def services_gone(self, told: str) -> TargetError:
        """See ``Surroundings``."""
        self.break_down("its services.exe is gone")
        return TargetError(f"{told}; its services.exe is gone", target=self.name)


def _advice(error: Exception) -> str:
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return "; free some, or set KDRIVER_CACHE to a folder elsewhere"
        case OSError(errno=errno.EROFS | errno.EACCES):
            return "; make it writable, or set KDRIVER_CACHE to a folder elsewhere"
        case _:
            return ""


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)
