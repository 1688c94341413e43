"""What the user has set: ``kdriver.toml``, or ``[tool.kdriver]`` in ``pyproject.toml``.

::

    vm = "wine"                     # the target, or a list of targets, of a run that names none
    isolation = "module"            # "test" | "module" | "session" | "none"
    manifest = "drivers/Cargo.toml" # where the drivers' cargo packages are
    profile = "dev"                 # the cargo profile they are built in
    timeout = 30                    # seconds for a Driver call
    artifacts = "kdriver-artifacts" # a folder for what a failed test leaves

    [targets.old-wine]
    kind = "wine"
    wine = "/opt/wine-8/bin/wine64"
    without = ["snapshots"]         # capabilities it shall not have

    [targets.nightly]
    kind = "libvirt"
    image = "winevm"                # more: vm_config.py

    [targets.lab]
    kind = "remote"
    host = "lab.example"            # more: remote_config.py
    user = "tester"

Paths are relative to the file. A key that is not known is an error.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from pytest_kdriver.errors import ConfigError
from pytest_kdriver.remote_config import REMOTE_KEYS, RemoteConfig, parse_remote
from pytest_kdriver.vm_config import VM_KEYS, VmSettings, parse_vm

Isolation: TypeAlias = Literal["test", "module", "session", "none"]

ISOLATIONS: Final[tuple[Isolation, ...]] = get_args(Isolation)
DEFAULT_TIMEOUT: Final = 30.0
FILE_NAME: Final = "kdriver.toml"

CAPABILITIES: Final[Mapping[str, str]] = {
    "kernel-log": "what the kernel and its drivers print is seen",
    "pool": "what drivers leave in the pool is seen",
    "pool-blocks": "each allocation and free is seen, and who called for it",
    "crashes": "a driver's crash is seen, with its code and address",
    "snapshots": "it can be put back into the state that it had before",
    "programs": "programs can be run in the guest",
}
"""Each capability that there is, and what a target that has it can do."""

_KEYS = ("vm", "isolation", "manifest", "profile", "timeout", "artifacts", "targets")
_TARGET_KEYS = {
    "wine": ("kind", "wine", "without"),
    "libvirt": ("kind", *VM_KEYS, "without"),
    "remote": ("kind", *REMOTE_KEYS, "without"),
}
"""The kinds of target, and what each may be told."""

_BUILT_IN_VMS: Final = ("winevm", "win10", "win11", "server2022", "server2025")
"""Machines of the disk images that this package has recipes of."""

_BUILT_IN_KINDS: Final = {"wine": "wine"} | dict.fromkeys(_BUILT_IN_VMS, "libvirt")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
"""It becomes part of file names, and of libvirt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """One ``[targets.NAME]``, or a built-in target.

    ``wine`` is the Wine to use, None for the first found; ``vm`` what was set of a virtual machine,
    ``remote`` an existing machine, None for the other kinds.
    """

    name: str
    kind: str
    wine: str | None = None
    vm: VmSettings = field(default_factory=dict)
    remote: RemoteConfig | None = None
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of a project, defaults filled in. ``root`` is the folder of the file they are from."""

    root: Path
    vm: tuple[str, ...] = ()
    isolation: Isolation | None = None
    manifest: Path | None = None
    profile: str = "dev"
    timeout: float = DEFAULT_TIMEOUT
    artifacts: Path | None = None
    targets: Mapping[str, TargetConfig] = field(default_factory=dict)

    def target(self, name: str) -> TargetConfig:
        """The target called ``name``; a ``ConfigError`` says which there are."""
        known = self.targets.get(name)
        if known is None:
            known_names = ", ".join(sorted(self.targets))
            raise ConfigError(
                f"no target {name!r}{_did_you_mean(name, self.targets)}; there are: {known_names}"
            )
        return known


def password_variable(target: str) -> str:
    """The environment variable that has a target's password; a config has none."""
    return "KDRIVER_PASSWORD_" + re.sub(r"[^A-Z0-9]", "_", target.upper())


def find_root(start: Path) -> Path:
    """The nearest folder from ``start`` upwards that has a kdriver config, else ``start``."""
    for folder in (start, *start.parents):
        if (folder / FILE_NAME).is_file() or _has_table(folder / "pyproject.toml"):
            return folder
    return start


def load_config(root: Path) -> Config:
    """The config in folder ``root``; the defaults where there is none. Raises ``ConfigError``."""
    path = root / FILE_NAME
    if path.is_file():
        return _parse(_read(path), path, root)
    path = root / "pyproject.toml"
    if _has_table(path):
        table = _read(path).get("tool", {}).get("kdriver", {})
        return _parse(table, path, root)
    return _parse({}, path, root)


def _has_table(path: Path) -> bool:
    try:
        return b"tool.kdriver" in path.read_bytes()
    except OSError:
        return False


def _read(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _parse(table: Mapping[str, object], path: Path, root: Path) -> Config:
    where = f"{path}: kdriver"
    _check_keys(table, _KEYS, where)
    isolation = table.get("isolation")
    if isolation is not None and isolation not in ISOLATIONS:
        raise ConfigError(f"{where}: isolation is {isolation!r}; allowed: {', '.join(ISOLATIONS)}")
    targets = _targets(table.get("targets", {}), where, root)
    config = Config(
        root=root,
        vm=_names(table.get("vm", ()), "vm", where),
        isolation=next((known for known in ISOLATIONS if known == isolation), None),
        manifest=_manifest(_string(table, "manifest", where), root, where),
        profile=_string(table, "profile", where) or "dev",
        timeout=_seconds(table.get("timeout", DEFAULT_TIMEOUT), where),
        artifacts=_path(_string(table, "artifacts", where), root),
        targets=targets,
    )
    for name in config.vm:
        try:
            config.target(name)
        except ConfigError as error:
            raise ConfigError(f"{where}: vm: {error}") from None
    return config


def _targets(table: object, where: str, root: Path) -> dict[str, TargetConfig]:
    targets = {
        "wine": TargetConfig(name="wine", kind="wine"),
        **{
            name: TargetConfig(name=name, kind="libvirt", vm={"image": name})
            for name in _BUILT_IN_VMS
        },
    }
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: targets is no table; write [targets.NAME]")
    for name, settings in table.items():
        inside = f"{where}: targets.{name}"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{inside}: a target's name is letters, digits, '.', '_' and '-'")
        if not isinstance(settings, dict):
            raise ConfigError(f"{inside} is no table; write [targets.{name}]")
        kind = settings.get("kind", _BUILT_IN_KINDS.get(name))
        if kind not in _TARGET_KEYS:
            allowed = ", ".join(_TARGET_KEYS)
            raise ConfigError(f"{inside}: kind is {kind!r}; allowed: {allowed}")
        _check_keys(settings, _TARGET_KEYS[kind], inside)
        targets[name] = TargetConfig(
            name=name,
            kind=kind,
            wine=_string(settings, "wine", inside),
            vm=_vm(name, settings, inside, root) if kind == "libvirt" else {},
            remote=_remote(settings, inside, root) if kind == "remote" else None,
            without=frozenset(_capabilities(settings.get("without", ()), inside)),
        )
    return targets


def _vm(name: str, table: Mapping[str, object], where: str, root: Path) -> VmSettings:
    settings = parse_vm({key: table[key] for key in VM_KEYS if key in table}, where, root)
    if "disk" not in settings and name in _BUILT_IN_KINDS:
        settings.setdefault("image", name)
    if ("disk" in settings) == ("image" in settings):
        raise ConfigError(f"{where}: one of disk and image is needed, and only one")
    return settings


def _remote(table: Mapping[str, object], where: str, root: Path) -> RemoteConfig:
    return parse_remote({key: table[key] for key in REMOTE_KEYS if key in table}, where, root)


def _check_keys(table: Iterable[str], allowed: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in allowed:
            raise ConfigError(
                f"{where}: unknown key {key!r}{_did_you_mean(key, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _names(value: object, key: str, where: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: a string, or a list of strings")
    return tuple(names)


def _capabilities(value: object, where: str) -> tuple[str, ...]:
    names = _names(value, "without", where)
    for name in names:
        if name not in CAPABILITIES:
            raise ConfigError(f"{where}: without is {name!r}; allowed: {', '.join(CAPABILITIES)}")
    return names


def _string(table: Mapping[str, object], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: a string")
    return value


def _seconds(value: object, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ConfigError(f"{where}: timeout is {value!r}; allowed: seconds, more than 0")


def _path(value: str | None, root: Path) -> Path | None:
    return None if value is None else root / Path(value).expanduser()


def _manifest(value: str | None, root: Path, where: str) -> Path | None:
    """The manifest that was named, else the root's own or that of its ``drivers`` folder."""
    named = _path(value, root)
    if named is not None:
        manifest = named / "Cargo.toml" if named.is_dir() else named
        if not manifest.is_file():
            raise ConfigError(f"{where}: manifest {value!r}: there is no {manifest}")
        return manifest
    usual = (root / "Cargo.toml", root / "drivers" / "Cargo.toml")
    return next((path for path in usual if path.is_file()), None)
