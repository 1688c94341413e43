"""A run: its config, its targets, each started when first needed, and when they are put back."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pytest_kdriver.config import Config, Isolation, TargetConfig
from pytest_kdriver.errors import BuildError, ConfigError, KdriverError, TargetError
from pytest_kdriver.handle import CurrentTest, TargetHandle
from pytest_kdriver.image.finder import ImageFinder
from pytest_kdriver.targets.libvirt import require_libvirt
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.target import Target
from pytest_kdriver.targets.wine import WineTarget


class Session:
    """The targets of a run, by name. ``artifacts`` is the folder for what failed tests leave.

    With ``dumps`` there are the minidumps of kernels that crashed, too. Raises ``ConfigError`` where that
    can't be a folder, or dumps have none.
    """

    def __init__(
        self, config: Config, *, artifacts: Path | None = None, dumps: bool = False
    ) -> None:
        self.config = config
        self.artifacts = artifacts or config.artifacts
        self.dumps = dumps
        if dumps and self.artifacts is None:
            raise ConfigError("dumps need a folder: give --kdriver-artifacts DIR, too")
        if self.artifacts is not None:
            try:
                self.artifacts.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"artifacts: {error}") from error
        self.current = CurrentTest()
        self.images = ImageFinder(config.root, config.manifest, profile=config.profile)
        self._targets: dict[str, Target] = {}
        self._failed: dict[str, str] = {}
        self._kept: dict[str, str | None] = {}
        """How to reach the guests that were kept; None once that was told."""
        self._to_keep: set[str] = set()
        self._modules: dict[str, set[str]] = {}
        """Whose traces are in each target: the modules that had it since it was put back."""

    def target(self, name: str) -> Target:
        """The target called ``name``, which need not be started yet. Raises ``KdriverError``."""
        if name not in self._targets:
            self._targets[name] = make_target(
                self.config.target(name), artifacts=self.artifacts, dumps=self.dumps
            )
        return self._targets[name]

    def describe(self, name: str) -> str:
        """What the target is, or why it can't be had, in one line."""
        try:
            return self.target(name).describe()
        except TargetError as error:
            return str(error)

    def handle(self, name: str) -> TargetHandle:
        """The same, as a test may use it."""
        return TargetHandle(
            self.target(name), self.images, current=self.current, timeout=self.config.timeout
        )

    def begin_test(self, beside: Path) -> None:
        """Forget the last test; the next one's file lies in the folder ``beside``."""
        self.current.beside = beside
        self.current.drivers.clear()
        self.current.untold.clear()

    def prepare(self, name: str, isolation: Isolation, module: str) -> None:
        """Have the target ready for a test of ``module``, put back as ``isolation`` wants it.

        A target that could not be started at first is not tried again: the same comes each time.
        """
        if name in self._failed:
            raise TargetError(self._failed[name])
        target = self.target(name)
        if name not in self._modules:
            try:
                target.start()
            except (TargetError, BuildError) as error:
                self._failed[name] = str(error)
                raise
        modules = self._modules.setdefault(name, set())
        if isolation == "test" or (isolation == "module" and modules - {module}):
            target.revert()
            modules.clear()
        else:
            target.repair()
        modules.add(module)

    def collect(self, name: str, stem: Path) -> list[str]:
        """See ``Target``."""
        target = self._targets.get(name)
        return target.collect(stem, dump=self.dumps) if target is not None else []

    def want_kept(self, name: str) -> None:
        """A test has failed on the target: its guest is to live on, whatever closes the target first."""
        self._to_keep.add(name)

    def keep(self, name: str) -> str | None:
        """Let the guest of a failed test live on, once for each target; how to reach it.

        None where it can't live on, or another one does already. Raises ``TargetError``.
        """
        target = self._targets.get(name)
        if target is not None and name not in self._kept:
            told = target.keep()
            if told is not None:
                self._kept[name] = told
                self._modules.get(name, set()).clear()
        if (told := self._kept.get(name)) is not None:
            self._kept[name] = None
        return told

    def see_through(self, name: str) -> None:
        """See ``Target``: the last test has no next one that would be told."""
        if name in self._targets:
            self._targets[name].see_through()

    def close(self) -> None:
        """Close all targets. Can be called again."""
        while self._targets:
            self.close_target(next(iter(self._targets)))

    def close_target(self, name: str) -> None:
        """Close one; if it is needed again, it is made anew. A guest that is to be kept is let go before."""
        if name in self._to_keep and name not in self._kept:
            with suppress(KdriverError, OSError):
                self._kept[name] = self.keep(name)
        target = self._targets.pop(name, None)
        self._modules.pop(name, None)
        self._failed.pop(name, None)
        if target is not None:
            target.close()


def default_isolation(target: Target) -> Isolation:
    """What counts where nobody chose."""
    return "module" if "snapshots" in target.capabilities else "none"


def make_target(
    config: TargetConfig, *, artifacts: Path | None = None, dumps: bool = False
) -> Target:
    """A target of the kind that ``config`` says. Raises ``TargetError``."""
    if config.kind == "libvirt":
        return _libvirt_target(config, artifacts, dumps)
    if config.kind == "remote":
        return _remote_target(config, artifacts)
    assert config.kind == "wine", "the config lets no other kind through"
    return WineTarget(config, artifacts=artifacts)


def _libvirt_target(config: TargetConfig, artifacts: Path | None, dumps: bool) -> Target:
    require_libvirt()
    from pytest_kdriver.targets.libvirt.machine import LibvirtMachine

    machine = LibvirtMachine(config, artifacts=artifacts, dumps=dumps)
    return MachineTarget(config.name, machine, artifacts=artifacts)


def _remote_target(config: TargetConfig, artifacts: Path | None) -> Target:
    from pytest_kdriver.targets.remote import RemoteMachine

    return MachineTarget(config.name, RemoteMachine(config), artifacts=artifacts)
