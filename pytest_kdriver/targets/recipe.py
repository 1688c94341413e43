"""Recipes: folders that say how a disk image is made.

A project's own are in ``vm/images/NAME/``, beside its config; those of this package are found too.
``recipe.toml``, beside a program called ``build``::

    description = "Debian 12 with Wine"
    as_root = true              # whether build is to be root, in namespaces of its own
    room = 4000                 # MiB that must be free to make it
    kept = 1300                 # MiB that it takes afterwards, about
    programs = ["mmdebstrap"]   # what build needs on this machine,
    packages = ["mmdebstrap"]   # and which packages of Debian have that

    [target]                    # what a target with this disk is like: the keys of vm_config.py,
    kernel = "vmlinuz"          # paths relative to the image's folder

A Windows is installed from its CD, and has no ``build``, but a table::

    [windows]
    release = "w11"             # "w10", "w11", "2k22", "2k25": virtio-win's folders are called so
    index = 1                   # which of the CD's editions; or its name: edition = "Windows 11 Pro"
    locale = "en-US"            # the CD's language
    hvci = false                # memory integrity
    user = "kdriver"            # an administrator, with a password of its own
    disk = 64                   # GiB that the guest's disk has
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

from pytest_kdriver.config import find_root
from pytest_kdriver.errors import ConfigError
from pytest_kdriver.guest.executable import AGENT, FORWARDER
from pytest_kdriver.kernel.sources.wine import DEBUG_CHANNELS
from pytest_kdriver.targets.prefix import SETTINGS
from pytest_kdriver.vm_config import VM_KEYS, VmSettings, parse_vm

FILE_NAME: Final = "recipe.toml"
BUILD: Final = "build"
FOLDER: Final = Path("vm/images")
"""Where a project has its own."""

_PACKAGE: Final = Path(__file__).parents[1]
_OURS: Final = (_PACKAGE / "_images", _PACKAGE.parent / FOLDER)
"""Of a wheel, and of a source tree."""

Release = Literal["w10", "w11", "2k22", "2k25"]

_LOCALE: Final = re.compile(r"[a-z]{2,3}(-[A-Z][a-z]{3})?-[A-Z]{2}")
_USER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
_LEAST_DISK: Final = 32 << 30
"""What Windows 10 and the servers ask for, in bytes."""

_NOT_DISKS: Final = frozenset({"disk", "image", "sha256", "uri"})
"""What only a target can say."""

WINE_ENVIRONMENT: Final = {
    "WINEDEBUG": DEBUG_CHANNELS,
    "WINEARCH": "win64",
    "WINEDLLOVERRIDES": "mscoree,mshtml=",
}
"""The environment of Wine's programs in a guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowsSetup:
    """How a Windows is installed. ``edition`` is its name on the CD, or its index there; ``disk`` bytes."""

    release: Release
    edition: str | int
    locale: str
    hvci: bool
    user: str
    disk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe. ``room`` and ``kept`` are bytes, ``target`` what it says of targets, checked.

    ``windows`` is None for what a ``build`` makes.

    Paths in ``target`` are those of ``folder``; a ``DiskImage`` has the right ones.
    """

    name: str
    folder: Path
    description: str
    as_root: bool
    room: int
    kept: int
    programs: tuple[str, ...]
    packages: tuple[str, ...]
    target: VmSettings
    target_table: Mapping[str, object]
    windows: WindowsSetup | None = None

    def key(self) -> str:
        """Changes whenever what comes out would: with its files, and with what of ours goes into it.

        A Windows' is of the recipe's files alone: it takes an hour, and a CD that a run need not have.
        """
        key = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts:
                continue  # pip compiles what is Python in a wheel
            executable = os.access(path, os.X_OK)
            _add(key, f"{path.relative_to(self.folder)}\0{executable}", path.read_bytes())
        if self.windows is not None:
            return key.hexdigest()[:16]
        for program in (AGENT.executable(), FORWARDER.executable()):
            _add(key, program.name, program.read_bytes())
        _add(key, "settings", SETTINGS.encode())
        _add(key, "environment", repr(sorted(WINE_ENVIRONMENT.items())).encode())
        return key.hexdigest()[:16]


def _add(key: hashlib._Hash, name: str, content: bytes) -> None:
    key.update(f"{name}\0{len(content)}\0".encode() + content)


def find_recipe(name: str, root: Path | None = None) -> Recipe:
    """The recipe called ``name``: of the project in ``root`` (by default the current one), else of ours.

    Raises ``ConfigError``, which says which there are.
    """
    for folder in _folders(root):
        if _NAME.fullmatch(name) and (folder / name / FILE_NAME).is_file():
            return read_recipe(folder / name)
    known = ", ".join(recipe.name for recipe in find_recipes(root)) or "none"
    raise ConfigError(
        f"no disk image {name!r}; there are: {known}; your own is a folder {FOLDER / name}, with "
        f"{FILE_NAME} and {BUILD} in it"
    )


def find_recipes(root: Path | None = None) -> list[Recipe]:
    """All recipes, by name. Raises ``ConfigError`` for one that is wrong."""
    found: dict[str, Path] = {}
    for parent in _folders(root):
        for path in sorted(parent.glob(f"*/{FILE_NAME}")):
            if _NAME.fullmatch(path.parent.name):
                found.setdefault(path.parent.name, path.parent)
    return [read_recipe(folder) for _, folder in sorted(found.items())]


def _folders(root: Path | None) -> tuple[Path, ...]:
    return ((root or find_root(Path.cwd())) / FOLDER, *_OURS)


def read_recipe(folder: Path) -> Recipe:
    """The recipe in ``folder``. Raises ``ConfigError``."""
    path = folder / FILE_NAME
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    windows = table.pop("windows", None)
    if windows is None and not os.access(folder / BUILD, os.X_OK):
        raise ConfigError(f"{folder / BUILD}: there is no such program")
    target = table.pop("target", {})
    if not isinstance(target, dict):
        raise ConfigError(f"{path}: target is no table; write [target]")
    reader = _Reader(table, path)
    recipe = Recipe(
        name=folder.name,
        folder=folder,
        description=reader.text("description"),
        as_root=reader.flag("as_root"),
        room=reader.mebibytes("room"),
        kept=reader.mebibytes("kept"),
        programs=reader.words("programs"),
        packages=reader.words("packages"),
        target=parse_target(target, f"{path}: target", folder),
        target_table=target,
        windows=_parse_windows(windows, path) if windows is not None else None,
    )
    if table:
        raise ConfigError(f"{path}: unknown key {min(table)!r}")
    return recipe


def _parse_windows(table: object, path: Path) -> WindowsSetup:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: windows is no table; write [windows]")
    reader = _Reader(table, path)
    if ("edition" in table) == ("index" in table):
        raise ConfigError(f"{path}: windows needs edition = NAME, or index = NUMBER")
    setup = WindowsSetup(
        release=cast("Release", reader.one_of("release", *get_args(Release))),
        edition=reader.number("index", 0) if "index" in table else reader.text("edition"),
        locale=reader.matching("locale", _LOCALE, "a name like en-US", "en-US"),
        hvci=reader.flag("hvci"),
        user=reader.matching("user", _USER, "letters, digits, '_', '-', at most 20", "kdriver"),
        disk=reader.number("disk", 64) << 30,
    )
    if table:
        raise ConfigError(f"{path}: unknown key {min(table)!r} in [windows]")
    if setup.edition in {"", 0} or setup.disk < _LEAST_DISK:
        raise ConfigError(
            f"{path}: index and disk are numbers of 1 and of {_LEAST_DISK >> 30} (GiB) or more, "
            "edition is not empty"
        )
    return setup


def parse_target(table: Mapping[str, object], where: str, folder: Path) -> dict[str, object]:
    """Check what a recipe says of targets; paths are relative to ``folder``. Raises ``ConfigError``."""
    allowed = [key for key in VM_KEYS if key not in _NOT_DISKS]
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key {key!r}; allowed: {', '.join(allowed)}")
    return parse_vm(table, where, folder)


class _Reader:
    """Takes known keys out of a recipe's table."""

    def __init__(self, table: dict[str, object], path: Path) -> None:
        self._table = table
        self._path = path

    def text(self, key: str) -> str:
        value = self._table.pop(key, "")
        if not isinstance(value, str) or not value.isprintable():
            raise self._refusal(key, value, "a line of text")
        return value

    def flag(self, key: str) -> bool:
        value = self._table.pop(key, False)
        if not isinstance(value, bool):
            raise self._refusal(key, value, "true, false")
        return value

    def mebibytes(self, key: str) -> int:
        return self.number(key, 0, "MiB, a whole number") << 20

    def number(self, key: str, default: int, allowed: str = "a whole number") -> int:
        value = self._table.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._refusal(key, value, allowed)
        return value

    def one_of(self, key: str, *words: str) -> str:
        value = self._table.pop(key, None)
        if value not in words:
            raise self._refusal(key, value, ", ".join(words))
        return str(value)

    def matching(self, key: str, pattern: re.Pattern[str], allowed: str, default: str) -> str:
        value = self._table.pop(key, default)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._refusal(key, value, allowed)
        return value

    def words(self, key: str) -> tuple[str, ...]:
        value = self._table.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self._refusal(key, value, "a list of names")
        return tuple(value)

    def _refusal(self, key: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self._path}: {key} is {value!r}; allowed: {allowed}")
