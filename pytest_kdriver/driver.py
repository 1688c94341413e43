"""What a test holds: a driver on a target."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypedDict, TypeVar

from pytest_kdriver.config import DEFAULT_TIMEOUT
from pytest_kdriver.device import Device, close, nt_path
from pytest_kdriver.errors import (
    AgentError,
    CapabilityError,
    ConfigError,
    DeviceError,
    DriverCrashed,
    DriverError,
    DriverTimeout,
    ImageError,
    KdriverError,
    LinkError,
    PoolError,
    StartFailed,
    StopFailed,
    TargetError,
    UnloadRefused,
)
from pytest_kdriver.guest.agent import Agent, IoOutcome, IoResult, OpenResult
from pytest_kdriver.guest.registry import encode_value
from pytest_kdriver.image.pool_tags import default_tags, used_tags
from pytest_kdriver.image.preflight import Report
from pytest_kdriver.image.symbols import Symbols, load_symbols
from pytest_kdriver.kernel.crash import Crash, find_crash, locate_crash
from pytest_kdriver.kernel.dbgprint import DbgPrint
from pytest_kdriver.kernel.events import DriverInitCalled, DriverUnload, ImageLoaded, ImageUnloaded
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.kernel.pool import Pool, PoolUses
from pytest_kdriver.kernel.pool_growth import PoolGrowth, growth
from pytest_kdriver.kernel.text import LAST_LINES, kernel_lines
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.target import (
    CallTimeout,
    Io,
    LoadOutcome,
    NoUnload,
    ParameterValue,
    Target,
)
from pytest_kdriver.win32error import Win32Error

E = TypeVar("E", bound=DriverError)

Permission: TypeAlias = Literal["forbid", "allow"]

_SERVICE_NAME: Final = re.compile(r"[\w.\- ]{1,80}", re.ASCII)


class ServiceState(Enum):
    """A service's state, as ``sc query`` names it; the values are SERVICE_STATUS's."""

    STOPPED = 1
    START_PENDING = 2
    STOP_PENDING = 3
    RUNNING = 4
    CONTINUE_PENDING = 5
    PAUSE_PENDING = 6
    PAUSED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleResult:
    """One start and stop. Times are in seconds; ``leaked`` is what this cycle alone left behind."""

    status: NTSTATUS
    start_seconds: float
    stop_seconds: float
    lines: list[str]
    leaked: PoolUses


class Cycles(list[CycleResult]):
    """Starts and stops, in order.

    ``growth`` is what each of them left in the pool, by tag and pool type, and how sure that is; the surest
    first. Empty where nothing is left, or that can't be seen.
    """

    def __init__(self, results: Iterable[CycleResult], growth: tuple[PoolGrowth, ...]) -> None:
        super().__init__(results)
        self.growth = growth


class _State(Enum):
    UNLOADED = "unloaded"
    LOADED = "loaded"
    LOST = "lost"


_NEVER: Final = 1 << 62
"""Added to a log position: nothing will ever come behind it."""


class _Told(TypedDict):
    """What every ``DriverError`` is told."""

    driver: str
    target: str
    lines: list[str]


class Driver:
    """A driver under test, on a target.

    Nobody constructs it: the fixture ``kdriver`` and ``TargetHandle.driver`` do. ``name`` is the
    driver's, ``service`` its service's, ``image`` its file on the host. The driver is checked, copied in
    and registered by the first start; ``preflight`` is what the check found, None before.
    """

    def __init__(
        self,
        target: Target,
        image: Path,
        *,
        name: str,
        service: str | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
        leaks: Permission = "forbid",
        breakpoints: Permission = "forbid",
        tags: Sequence[str] = (),
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self.name = name
        self.service = check_service_name(service or name)
        self.image = image
        self.last_status: NTSTATUS | None = None
        self.preflight: Report | None = None
        self._target = target
        self._parameters = dict(parameters or {})
        for value in self._parameters.values():
            encode_value(value)  # what the registry can't keep is told before anything is done
        self._leaks: Permission = leaks
        self._breakpoints: Permission = breakpoints
        self._tags = tuple(tags)
        self._timeout = timeout
        self._state = _State.UNLOADED
        self._installed_in: int | None = None
        self._loaded_from = 0
        self._sampled_in: int | None = None
        """The generation of a sample of its pool that has none behind its load yet."""
        self._started = False
        self._finished = False
        self._gone = False
        self._devices: list[Device] = []
        self._untold: list[KdriverError] = []
        self._thread = threading.get_ident()
        self._told_elsewhere: DriverError | None = None
        self._crash_seen_to = _NEVER  # before its first load a crash is none of its
        self._judged_to = len(target.log)
        self._window = target.log.window(self.service)
        self._dbgprint = DbgPrint(
            self._window,
            driver=self.service,
            target=target.name,
            on_crash=self._untold_crash,
        )
        self._pool = self._pool_of(self._window)

    def _pool_of(self, window: Window) -> Pool:
        return Pool(
            window,
            driver=self.service,
            tags=self._tags,
            load_symbols=self._load_symbols,
            refuse=self._refuse_pool,
        )

    @cached_property
    def _pool_tags(self) -> frozenset[str]:
        """The tags that its pool is counted by: the marker's, else those that its image uses.

        Where the image does not show them all, they may be from elsewhere, as the framework's is: by default
        that is made of the package's name.
        """
        if self._tags:
            return frozenset(self._tags)
        used = used_tags(self.image)
        return used.tags if used.all_seen else used.tags | default_tags(self.name)

    def _load_symbols(self) -> Symbols:
        return load_symbols(self.image)

    # what was seen

    @property
    def window(self) -> Window:
        """What was seen in this test: the driver's events, and those that nobody can attribute."""
        self._need("kernel-log")
        return self._window

    @property
    def dbgprint(self) -> DbgPrint:
        """What was printed in this test. Raises ``CapabilityError`` where the target can't see it."""
        self._need("kernel-log")
        return self._dbgprint

    @property
    def pool(self) -> Pool:
        """What was allocated in this test. Raises ``CapabilityError`` where the target can't see it."""
        self._need("pool")
        return self._pool

    @property
    def log_lag(self) -> str:
        """See ``Target.describe_feed``."""
        return self._target.describe_feed()

    @property
    def sees_blocks(self) -> bool:
        """Whether the target sees each block of pool, and not only what is left of them."""
        return "pool-blocks" in self._target.capabilities

    @property
    def loaded(self) -> bool:
        """Whether the driver is in the guest's kernel, as far as its calls, and the kernel log, have told."""
        self._notice_unload()
        return self._state is _State.LOADED

    @property
    def lost(self) -> bool:
        """Whether it crashed, was cut short, or can't be unloaded: what it holds can't be judged."""
        return self._state is _State.LOST

    @property
    def service_state(self) -> ServiceState | None:
        """What the service control manager says of the service; None: it has no such service."""
        with asking(self._target, "service_state") as agent:
            status = agent.query_service(self.service, timeout=self._timeout)
        return None if status is None else ServiceState(status.state)

    # what can be done

    def start(self, *, check: bool = True, timeout: float | None = None) -> NTSTATUS:
        """Load the driver; DriverEntry's own status, or the loader's where DriverEntry never ran.

        With ``check`` an error status raises ``StartFailed``. ``timeout`` is in seconds. Raises
        ``DriverCrashed`` and ``DriverTimeout`` too, and ``ImageError`` where the file can't be loaded.
        """
        outcome = self._load(self._target.load, timeout)
        if check and not outcome.loaded:
            raise StartFailed(self._why_not(outcome), status=outcome.status, **self._told())
        return outcome.status

    def start_service(self, *, timeout: float | None = None) -> Win32Error:
        """Start by the service control manager, as ``sc start`` does; its answer, error or not."""
        outcome = self._load(self._target.load_by_service_manager, timeout)
        return outcome.code if outcome.code is not None else Win32Error.ERROR_SUCCESS

    def stop(self, *, timeout: float | None = None) -> None:
        """Unload the driver.

        Raises ``UnloadRefused`` where it has no DriverUnload, ``StopFailed`` where it is not running or
        the guest says no, ``DriverCrashed``, ``DriverTimeout``.
        """
        if self._finished and self._state is not _State.LOADED:
            return  # the verdict has stopped it already; a fixture's own stop is no mistake
        was_loaded = self._state is _State.LOADED
        self._enter()
        if was_loaded and self._state is _State.LOST:
            return  # it went with its guest, which another driver brought down
        if self._state is not _State.LOADED:
            raise StopFailed("it is not running", **self._told())
        self._close_devices(timeout)
        limit = self._timeout if timeout is None else timeout
        try:
            code = self._target.unload(self.service, limit)
        except CallTimeout as late:
            raise self._late("stop", "DriverUnload", limit, late) from None
        except NoUnload:
            self._lose(f"{self.service} can't be unloaded")
            raise UnloadRefused(
                "it has no DriverUnload, so it stays loaded until the guest ends", **self._told()
            ) from None
        except TimeoutError as error:
            raise self._slow("stop", "asking the guest to stop it", limit, error) from error
        except TargetError:
            self._raise_crash()  # with its guest the driver is gone
            self._lose(f"the guest went while {self.service} was stopped")
            raise
        except Exception:
            raise
        except BaseException:
            self.abandon()
            raise
        self._raise_crash()
        if code:
            raise StopFailed(f"the guest says {code}", code=code, **self._told())
        self._state = _State.UNLOADED
        self._sample_behind()

    @contextmanager
    def running(self, *, timeout: float | None = None) -> Iterator[Driver]:
        """Start, and stop at the end, unless it was stopped, or crashed and the test knows."""
        self.start(timeout=timeout)
        with self._ended_by(lambda: self._stop_if_loaded(timeout)):
            yield self

    @contextmanager
    def device(self, path: str, *, timeout: float | None = None) -> Iterator[Device]:
        r"""Open a device, and close it at the end: ``device(r"\\.\Echo")``, or by its kernel's name.

        ``timeout``, in seconds, is for the opening. Handles that are still open when the driver is stopped
        are closed first: they would hold up the unload. Raises ``DeviceError`` where the guest answers with
        an error, ``DriverTimeout``, ``DriverCrashed``; ``ConfigError`` for what can't be a path.
        """
        device = self._open(nt_path(path), timeout)
        with self._ended_by(lambda: self._close_device(device)):
            yield device

    @contextmanager
    def _ended_by(self, end: Callable[[], None]) -> Iterator[None]:
        """Do ``end`` behind the body. What the body raises matters more than what ``end`` does.

        The verdict will tell that.
        """
        try:
            yield
        except Exception as error:
            try:
                end()
            except KdriverError as second:
                self._untold.append(second)
                error.add_note(f"besides: {second}")
            raise
        end()

    def _stop_if_loaded(self, timeout: float | None = None) -> None:
        self._notice_unload()
        if self._state is _State.LOADED:
            self.stop(timeout=timeout)

    def cycle(self, count: int, *, timeout: float | None = None) -> Cycles:
        """Start and stop ``count`` times, each with ``check``. ``timeout`` is each call's."""
        log = self._target.log
        whole = log.window(self.service)
        results, left = [], []
        for _ in range(count):
            window = log.window(self.service)
            results.append(self._cycle_once(window, timeout))
            if "pool" in self._target.capabilities:
                left.append(self._pool_of(window).left)
        return Cycles(results, growth(left, shared=self._pool_of(whole).shared))

    def _cycle_once(self, window: Window, timeout: float | None) -> CycleResult:
        begin = time.monotonic()
        status = self.start(timeout=timeout)
        started = time.monotonic()
        self.stop(timeout=timeout)
        stopped = time.monotonic()
        window.close()
        printed = DbgPrint(
            window, driver=self.service, target=self._target.name, on_crash=self._untold_crash
        )
        seen = self._target.capabilities
        return CycleResult(
            status=status,
            start_seconds=started - begin,
            stop_seconds=stopped - started,
            lines=printed.lines if "kernel-log" in seen else [],
            leaked=self._pool_of(window).leaked if "pool" in seen else PoolUses(),
        )

    # the verdict

    def finish(self) -> None:
        """Stop, unregister, and judge: raises what the test has not been told yet.

        ``PoolError`` for leaks (unless allowed), double frees and frees with a wrong tag since the last
        ``finish``; ``DriverCrashed``; whatever stopping raises. Can be called again.
        """
        errors, self._untold = self._untold, []
        for step in (
            self._raise_crash,
            self._stop_if_loaded,
            self._close_devices,
            self._give_up_if_loaded,
            self._sample_behind,
            self._uninstall,
        ):
            try:
                step()
            except TargetError as error:  # which may be of a crash that is told by nothing else
                errors.append(self._untold_crash() or error)
            except KdriverError as error:
                errors.append(error)
        self._finished = True
        if not errors:
            try:
                self._judge()
            except KdriverError as error:
                errors.append(error)
        self._judged_to = len(self._target.log)
        raise_first(errors)

    def abandon(self) -> None:
        """Let go of it unjudged, as it is after an interrupt; the target will be put back."""
        self._crash_seen_to = len(self._target.log) + _NEVER
        self._lose(f"a test of {self.service} was interrupted")

    def resume(self) -> None:
        """Be as new for what is done after ``finish``; what was seen stays to be seen."""
        self._started = self._gone = False
        self._state = _State.UNLOADED
        self._sampled_in = None

    def _give_up_if_loaded(self) -> None:
        if self._state is _State.LOADED:
            self._lose(f"{self.service} could not be stopped")

    def _judge(self) -> None:
        if self._gone and self._leaks == "forbid":
            raise PoolError(
                "whether it leaks can't be seen: its guest was put back while it was loaded; "
                "leaks='allow' does without",
                **self._told(),
            )
        if not self._started or self._state is _State.LOST:
            return
        if "pool" not in self._target.capabilities:
            if self._leaks == "forbid":
                raise PoolError(
                    f"whether it leaks can't be seen on target {self._target.name!r}; "
                    "@pytest.mark.kdriver(..., leaks='allow') does without",
                    **self._told(),
                )
            return
        if self._sampled_in is not None and self._leaks == "forbid":
            raise PoolError(
                "whether it leaks can't be seen: its pool was not counted when it was gone",
                **self._told(),
            )
        problems = self._pool.problems(leaks=self._leaks == "forbid", start=self._judged_to)
        if problems:
            raise PoolError(problems, driver=self.service, target=self._target.name)

    def _uninstall(self) -> None:
        if self._installed_in == self._target.generation:
            self._installed_in = None
            if self._state is not _State.LOST:
                try:
                    self._target.uninstall(self.service, self._timeout)
                except TimeoutError as error:
                    raise self._slow(
                        "uninstall", "unregistering it", self._timeout, error
                    ) from error
                except AgentError as error:
                    self._target.break_down(f"{self.service} could not be unregistered")
                    raise DriverError(f"unregistering it: {error}", **self._told()) from error

    # how

    def _load(
        self, load: Callable[[str, float], LoadOutcome], timeout: float | None
    ) -> LoadOutcome:
        limit = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._enter()
        begin = len(self._target.log)
        try:
            self._install(limit)
            deadline += self._sample_before()
            self._crash_seen_to = len(self._target.log)
            self._started = True
            outcome = load(self.service, max(deadline - time.monotonic(), 0.0))
        except CallTimeout as late:
            raise self._late("start", "DriverEntry", limit, late) from None
        except TimeoutError as error:
            raise self._slow("start", "asking the guest to start it", limit, error) from error
        except TargetError:
            self._raise_crash()
            began = self._window.numbered(begin, (DriverInitCalled, ImageLoaded))
            if any(event.driver == self.service for _, event in began):
                self._lose(f"the guest went while {self.service} was started")
            raise
        except Exception:
            raise
        except BaseException:
            self.abandon()
            raise
        self.last_status = outcome.status
        if (
            outcome.status != NTSTATUS.STATUS_IMAGE_ALREADY_LOADED
            or self._state is not _State.LOADED
        ):
            self._state = _State.LOADED if outcome.loaded else _State.UNLOADED
            self._loaded_from = begin
        self._raise_crash()
        self._sample_behind()
        return outcome

    def _sample_before(self) -> float:
        """Have its pool counted before a load, where nothing else tells of it; how many seconds that took."""
        if self._state is _State.LOADED or not self._target.samples_pool:
            return 0.0
        begin = time.monotonic()
        self._target.sample_pool(self.service, self._pool_tags, "before")
        self._sampled_in = self._target.generation
        return time.monotonic() - begin

    def _sample_behind(self) -> None:
        """Have its pool counted, if it is gone, and was counted before its load."""
        if self._state is _State.UNLOADED and self._sampled_in == self._target.generation:
            try:
                self._target.sample_pool(self.service, self._pool_tags, "after")
            except TargetError:
                self._raise_crash()
                raise
            self._sampled_in = None

    def _enter(self) -> None:
        """What each call begins with: no news of a crash, and a guest that can be trusted."""
        self._raise_crash()
        self._notice_unload()
        self._target.repair()
        if self._installed_in not in (None, self._target.generation):
            self._installed_in = None
            if self._state is _State.LOADED:
                self._state = _State.LOST
                self._gone = True
                self._pool.give_up()

    def _notice_unload(self) -> None:
        """Somebody else may have stopped it, as ``sc stop`` in the guest does."""
        gone = self._window.numbered(self._loaded_from, (DriverUnload, ImageUnloaded))
        if self._state is _State.LOADED and any(e.driver == self.service for _, e in gone):
            self._state = _State.UNLOADED

    def _install(self, limit: float) -> None:
        if self._installed_in != self._target.generation:
            self.preflight = self._target.preflight(self.image)
            if self.preflight.errors:
                raise ImageError("\n".join(error.message for error in self.preflight.errors))
            try:
                self._target.install(self.service, self.image, self._parameters, limit)
            except TimeoutError as error:
                raise self._slow(
                    "install", "copying it in and registering it", limit, error
                ) from error
            except AgentError as error:
                self._target.break_down(f"{self.service} is half installed")
                raise DriverError(f"installing it: {error}", **self._told()) from error
            self._installed_in = self._target.generation

    # devices

    def _open(self, path: str, timeout: float | None) -> Device:
        self._enter()
        what = f"open of {path}"
        result = self._device_io(
            "open",
            what,
            lambda agent, limit: agent.open_device(path, time_limit=limit),
            timeout,
        )
        self._ended(result, "open", what, timeout)
        assert result.device is not None, "it is open"
        device = Device(path, result.device, self._target.generation, self._perform)
        self._devices.append(device)
        return device

    def _perform(
        self,
        device: Device,
        phase: str,
        what: str,
        io: Callable[[Agent, float], IoResult],
        timeout: float | None,
    ) -> bytes:
        self._raise_crash()
        if device.closed or device.generation != self._target.generation:
            why = "its handle is closed" if device.closed else "its guest was put back"
            raise DeviceError(
                f"{what}: {why}", status=NTSTATUS.STATUS_INVALID_HANDLE, **self._told()
            )
        result = self._device_io(phase, what, io, timeout)
        if result.outcome is IoOutcome.CANCELLED and device.closed:
            raise DeviceError(
                f"{what}: its handle was closed meanwhile, which cancelled it",
                status=NTSTATUS.STATUS_CANCELLED,
                **self._told(),
            )
        return self._ended(result, phase, what, timeout).data

    def _device_io(
        self,
        phase: str,
        what: str,
        io: Callable[[Agent, float], Io],
        timeout: float | None,
    ) -> Io:
        limit = self._timeout if timeout is None else timeout
        try:
            result = self._target.device_io(self.service, io, limit)
        except CallTimeout as late:
            raise self._late(phase, what, limit, late) from None
        except TargetError:
            self._raise_crash()  # with its guest the driver is gone
            raise
        except AgentError as error:
            if phase == "close":
                self._target.break_down("a device could not be closed")
            raise DriverError(f"{what}: {error}", **self._told()) from error
        except Exception:
            raise
        except BaseException:
            self.abandon()
            raise
        self._raise_crash()
        return result

    def _ended(self, result: Io, phase: str, what: str, timeout: float | None) -> Io:
        """The result, if it is a good one."""
        if result.outcome is IoOutcome.CANCELLED:
            limit = self._timeout if timeout is None else timeout
            raise DriverTimeout(
                f"{what} was not over after {limit:g} s; it was cancelled, and ended with {result.status}",
                phase=phase,
                timeout=limit,
                **self._told(),
            )
        if not result.status.is_success:
            raise DeviceError(
                f"{what} failed with {result.status}{self._why_not_there()}",
                status=result.status,
                data=_data(result),
                **self._told(),
            )
        return result

    def _why_not_there(self) -> str:
        if self._target.broken is not None:
            return f"; {self._target.broken}"
        return "" if self.loaded else "; the driver is not loaded"

    def _close_device(self, device: Device, timeout: float | None = None) -> None:
        if device.closed:
            return
        device.closed = True
        with suppress(ValueError):
            self._devices.remove(device)
        if device.generation == self._target.generation and self._state is not _State.LOST:
            self._device_io(
                "close",
                f"close of {device.path}",
                lambda agent, limit: close(agent, device, limit),
                timeout,
            )

    def _close_devices(self, timeout: float | None = None) -> None:
        """Close the handles that are still open; the first that goes wrong is told."""
        errors = []
        while self._devices:
            device = self._devices.pop()
            try:
                self._close_device(device, timeout)
            except KdriverError as error:
                errors.append(error)
        raise_first(errors)

    def _raise_crash(self) -> None:
        elsewhere = self._told_elsewhere
        if elsewhere is not None and threading.get_ident() == self._thread:
            self._told_elsewhere = None
            raise elsewhere.with_traceback(None) from None
        if "crashes" in self._target.capabilities and self._find_crash() is not None:
            raise self._crash_error() from None  # that the agent is gone, too, says nothing more

    def _tell(self, error: E) -> E:
        """``error``, about the end of the driver. What another thread hears, the test's own hears as well.

        A thread's errors are easily lost, and no test may pass by that.
        """
        if threading.get_ident() != self._thread:
            self._told_elsewhere = self._told_elsewhere or error
        return error

    def _untold_crash(self) -> DriverCrashed | None:
        """The crash as an exception, None where the test knows of it already."""
        return None if self._find_crash() is None else self._crash_error()

    def _find_crash(self) -> Crash | None:
        log = self._target.log
        end = len(log)
        crash = find_crash(
            log.window(self.service, self._crash_seen_to),
            self.service,
            breakpoints=self._breakpoints == "forbid",
            told_to=self._target.crashes_told_to,
        )
        if crash is None:
            self._crash_seen_to = max(self._crash_seen_to, end)  # not looked through again
        return crash

    def _crash_error(self) -> DriverCrashed:
        """The crash as an exception; from now on the test knows."""
        crash = self._find_crash()
        self._crash_seen_to = len(self._target.log) + _NEVER
        self._target.crashes_told_to = len(self._target.log)
        self._lose(f"{self.service} crashed")
        if crash is None:
            return self._tell(DriverCrashed("it crashed", **self._told()))
        crash = locate_crash(crash, self._window, self.service, self._load_symbols)
        return self._tell(
            DriverCrashed(
                "\n".join((crash.description, *(f"    {line}" for line in crash.details))),
                code=crash.code,
                parameters=crash.parameters,
                address=crash.address,
                **self._told(),
            )
        )

    def _lose(self, reason: str) -> None:
        self._state = _State.LOST
        self._pool.give_up()
        self._target.break_down(reason)

    def _late(self, phase: str, routine: str, limit: float, late: CallTimeout) -> DriverTimeout:
        """What to raise where a call had to be cut. Of what a kernel that hangs does then, nobody is told."""
        self._crash_seen_to = len(self._target.log) + _NEVER
        self._target.crashes_told_to = len(self._target.log)
        self._lose(f"{self.service} did not return from {routine}")
        return self._tell(
            DriverTimeout(
                f"{routine} did not return within {limit:g} s; {late.cut}",
                phase=phase,
                timeout=limit,
                **self._told(),
            )
        )

    def _slow(self, phase: str, doing: str, limit: float, error: TimeoutError) -> DriverTimeout:
        self._lose(f"{doing} took too long")
        return DriverTimeout(
            f"{doing} was not over after {limit:g} s ({error})",
            phase=phase,
            timeout=limit,
            **self._told(),
        )

    def _why_not(self, outcome: LoadOutcome) -> str:
        if outcome.status.is_success:
            return (
                f"DriverEntry returned {outcome.status}, which is a success on Windows; "
                f"this target takes nothing but STATUS_SUCCESS ({outcome.code})"
            )
        if outcome.status == NTSTATUS.STATUS_UNSUCCESSFUL and outcome.code is not None:
            # May be no status of DriverEntry's, but all that can be said of a code that has no other.
            return f"the start failed with {outcome.status}; the guest says {outcome.code}"
        return f"the start failed with {outcome.status}"

    def _told(self) -> _Told:
        lines = kernel_lines(self._window, LAST_LINES)
        return _Told(driver=self.service, target=self._target.name, lines=lines)

    def _need(self, capability: str) -> None:
        need(self._target, capability)

    def _refuse_pool(self, unloaded: bool) -> None:
        self._need("pool" if unloaded else "pool-blocks")
        if unloaded and self._state is _State.LOADED:
            raise DriverError(
                "it is still loaded, so nothing has leaked yet: stop it first, or ask for in_use",
                driver=self.service,
                target=self._target.name,
            )


def _data(result: IoResult | OpenResult) -> bytes:
    return result.data if isinstance(result, IoResult) else b""


def check_service_name(name: str) -> str:
    """``name``, if it can be a service's and a file's name; a ``ConfigError`` if not."""
    if not _SERVICE_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't be a service's name: letters, digits, '_', '-', '.' and ' ', at most 80; "
            "give another with service="
        )
    return name


def need(target: Target, capability: str) -> None:
    """Raise ``CapabilityError`` unless ``target`` has ``capability``."""
    if capability not in target.capabilities:
        raise CapabilityError(
            f"it has no capability {capability!r}, so this can't be seen or done there",
            target=target.name,
            capability=capability,
        )


@contextmanager
def asking(target: Target, what: str) -> Iterator[Agent]:
    """The target's agent, for something that is no driver's. A lost or slow one is a ``TargetError``."""
    if target.agent.closed:
        target.repair()
    agent = target.agent
    try:
        with target.agent_errors(what):
            try:
                yield agent
            except LinkError:
                agent.close()  # a send may fail before the end is read, and the next has to know
                raise
    except TimeoutError as error:
        raise TargetError(f"{what} was not over in time: {error}", target=target.name) from error


def raise_first(errors: Sequence[KdriverError]) -> None:
    """Raise the first of ``errors``, which tells of the others; nothing if there are none."""
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"besides: {other}")
        raise errors[0]
