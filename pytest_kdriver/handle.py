"""What a test holds: the target that it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_kdriver.config import DEFAULT_TIMEOUT
from pytest_kdriver.driver import Driver, Permission, asking, need
from pytest_kdriver.errors import KdriverError
from pytest_kdriver.guest.agent import Completed
from pytest_kdriver.image.finder import ImageFinder, is_path
from pytest_kdriver.targets.target import ParameterValue, Target


@dataclass(slots=True)
class CurrentTest:
    """What a target's handle has to know of the test that runs, and the verdict of the handle's drivers.

    ``beside`` is the test file's folder, ``drivers`` those that were made for the test, ``untold`` what
    went wrong with them while the test had something else to raise.
    """

    beside: Path | None = None
    drivers: list[Driver] = field(default_factory=list)
    untold: list[KdriverError] = field(default_factory=list)


class Registry:
    """The guest's registry, below HKEY_LOCAL_MACHINE. Keys are written with backslashes."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get(self, key: str, name: str) -> int | str | bytes | list[str] | None:
        """A value: REG_DWORD and REG_QWORD, REG_SZ, REG_BINARY, REG_MULTI_SZ. None: there is none."""
        with asking(self._target, "reading the registry") as agent:
            return agent.get_value(key, name)

    def set(self, key: str, name: str, value: ParameterValue) -> None:
        """Set a value, and make its key where there is none."""
        with asking(self._target, "writing the registry") as agent:
            agent.set_value(key, name, value)

    def delete(self, key: str, name: str) -> None:
        """Delete a value."""
        with asking(self._target, "writing the registry") as agent:
            agent.delete_value(key, name)


class TargetHandle:
    """A target, as a test may use it: more drivers, programs, files, the registry.

    Nobody constructs it: the fixture ``kdriver_target`` does.
    """

    def __init__(
        self,
        target: Target,
        images: ImageFinder,
        *,
        current: CurrentTest | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        self._target = target
        self._images = images
        self._current = current or CurrentTest()
        self._timeout = timeout

    @property
    def name(self) -> str:
        """The target's name, as ``--kdriver-vm`` has it."""
        return self._target.name

    @property
    def capabilities(self) -> frozenset[str]:
        """What the target can see and do."""
        return self._target.capabilities

    @property
    def registry(self) -> Registry:
        """The guest's registry."""
        return Registry(self._target)

    @contextmanager
    def driver(
        self,
        name: str,
        *,
        service: str | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
        leaks: Permission = "forbid",
        breakpoints: Permission = "forbid",
        tags: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Iterator[Driver]:
        """One more driver, judged at the end of the ``with``. The arguments are the marker's."""
        driver = self.make_driver(
            name,
            service=service,
            parameters=parameters,
            leaks=leaks,
            breakpoints=breakpoints,
            tags=tags,
            timeout=timeout,
        )
        try:
            yield driver
        except KeyboardInterrupt:
            driver.abandon()
            raise
        except BaseException as error:  # pytest's outcomes, such as a skip, are no Exceptions
            try:
                driver.finish()
            except KdriverError as second:
                self._current.untold.append(second)
                error.add_note(f"besides: {second}")
            raise
        driver.finish()

    def make_driver(
        self,
        name: str,
        *,
        service: str | None = None,
        parameters: Mapping[str, ParameterValue] | None = None,
        leaks: Permission = "forbid",
        breakpoints: Permission = "forbid",
        tags: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Driver:
        """The same without the ``with``: the caller has to ``finish`` it."""
        image = self._images.find(name, beside=self._current.beside)
        driver = Driver(
            self._target,
            image,
            name=image.stem.removesuffix("_package") if is_path(name) else name,
            service=service,
            parameters=parameters,
            leaks=leaks,
            breakpoints=breakpoints,
            tags=tags,
            timeout=self._timeout if timeout is None else timeout,
        )
        self._current.drivers.append(driver)
        return driver

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        directory: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Completed:
        """Run a program in the guest to its end. Past ``timeout`` seconds it is ended, and told as such.

        What drivers printed meanwhile can be seen when it returns.
        """
        need(self._target, "programs")
        with asking(self._target, "run") as agent:
            done = agent.run(command, stdin=stdin, directory=directory, time_limit=timeout)
        self._target.fence()
        return done

    def put(self, source: Path | bytes, path: str) -> None:
        """Copy a file, or bytes, to ``path`` in the guest; folders are made."""
        with asking(self._target, "put") as agent:
            agent.put(source, path)

    def get(self, path: str) -> bytes:
        """The content of the guest's file ``path``."""
        with asking(self._target, "get") as agent:
            return agent.get(path)

    def delete(self, path: str) -> None:
        """Delete the guest's file ``path``."""
        with asking(self._target, "delete") as agent:
            agent.delete(path)
