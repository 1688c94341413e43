"""A disk image of Windows: installed once, from the user's own ISO, by nobody's hand."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import AgentError, ConfigError, TargetError
from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import disk_images
from pytest_kdriver.targets.disk_images import DISK, DiskImage, Phase
from pytest_kdriver.targets.libvirt.base_disk import file_sha256
from pytest_kdriver.targets.libvirt.connection import Hypervisor
from pytest_kdriver.targets.recipe import Recipe, parse_target
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows.answer_file import (
    AGENT_PATH,
    AGENT_SERVICE,
    Secrets,
    answer_file,
)
from pytest_kdriver.targets.windows.certificate import make_certificate
from pytest_kdriver.targets.windows.installation import Installation, Limits
from pytest_kdriver.targets.windows.passwords import (
    forget_password,
    keep_password,
    new_password,
)
from pytest_kdriver.targets.windows.provisioning import needed_drivers, read_drivers, write_cd
from pytest_kdriver.targets.windows.scrubbing import scrub_disk, scrub_guest
from pytest_kdriver.targets.windows.settings import (
    Wanted,
    make_settings,
    read_settings,
    switch_debugger_on,
)
from pytest_kdriver.vm_config import DEFAULT_URI, VmConfig, vm_config

CERTIFICATE: Final = "winrm.pem"
PRODUCT_KEY: Final = re.compile(r"[A-Z0-9]{5}(-[A-Z0-9]{5}){4}")

_PLAIN: Final = {"bus": "sata", "nic": "e1000e", "agent_port": "com2"}
"""What a machine has that every Windows knows; COM1 is a debugger's."""

_VIRTIO: Final = {"bus": "virtio", "nic": "virtio", "agent_port": "virtio:kdriver.agent"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a Windows is installed from, and under which libvirt."""

    iso: Path
    virtio_win: Path | None = None
    product_key: str | None = field(default=None, repr=False)
    uri: str = DEFAULT_URI


def build_image(
    recipe: Recipe,
    source: Source,
    run: Run,
    progress: Callable[[Phase], None],
    *,
    limits: Limits | None = None,
) -> DiskImage:
    """The image of ``recipe`` from these CDs; installed if it is not there. Raises ``TargetError``.

    ``progress`` is told of each phase.
    """
    target, machine = describe_target(recipe, virtio=source.virtio_win is not None)
    if needed_drivers(machine) and source.virtio_win is None:
        raise ConfigError(
            f"{recipe.folder}: its target needs virtio's drivers ({', '.join(needed_drivers(machine))}): "
            "--virtio-win FILE"
        )
    progress(Phase(f"hashing {source.iso.name}", 0.0))
    media = [path for path in (source.iso, source.virtio_win) if path is not None]
    key = hashlib.sha256("".join(file_sha256(path) for path in media).encode()).hexdigest()[:8]
    folder = f"{recipe.name}-{recipe.key()}-{key}"

    def build(making: Path, phase: Callable[[str], None]) -> Mapping[str, object]:
        password = new_password()
        keep_password(folder, password)  # in an hour there may be no room for it
        try:
            secrets = Secrets(password=password, product_key=source.product_key)
            hypervisor = Hypervisor.open(source.uri)
            try:
                with Installation(
                    hypervisor,
                    run,
                    recipe.name,
                    machine,
                    phase=phase,
                    picture=picture(recipe),
                    limits=limits or Limits(),
                ) as installation:
                    _provision(installation, recipe, machine, source, secrets)
                    _install(installation, recipe, source, secrets, making)
            finally:
                hypervisor.close()
        except BaseException:
            forget_password(folder)
            raise
        return target

    return disk_images.make_once(recipe, folder, run, progress, build)


def describe_target(recipe: Recipe, *, virtio: bool) -> tuple[dict[str, object], VmConfig]:
    """What a target with the image will be like, as a table and checked. What the recipe says counts more."""
    assert recipe.windows is not None
    table: dict[str, object] = {
        **(_VIRTIO if virtio else _PLAIN),
        "winrm_user": recipe.windows.user,
        "winrm_ca": CERTIFICATE,
        "winrm_command": AGENT_PATH,
        **recipe.target_table,
    }
    where = f"{recipe.folder}: target"
    machine = vm_config(parse_target(table, where, recipe.folder), where=where)
    return table, machine


def picture(recipe: Recipe) -> Path:
    """The file that has an installation's screen."""
    return cache_directory() / "screenshots" / f"{recipe.name}-install.png"


def _provision(
    installation: Installation,
    recipe: Recipe,
    machine: VmConfig,
    source: Source,
    secrets: Secrets,
) -> None:
    """Write the CD that the installation finds beside Windows' own."""
    setup = recipe.windows
    assert setup is not None
    drivers = {}
    if source.virtio_win is not None:
        drivers = read_drivers(source.virtio_win, needed_drivers(machine), setup.release)
    answer = answer_file(setup, machine, secrets)
    write_cd(installation.provisioning, answer, AGENT.executable(), drivers)


def _install(
    installation: Installation, recipe: Recipe, source: Source, secrets: Secrets, making: Path
) -> None:
    """Leave the disk of an installed Windows in ``making``, and the certificate of its WinRM."""
    setup = recipe.windows
    assert setup is not None
    pfx, certificate = make_certificate()
    (making / CERTIFICATE).write_bytes(certificate)
    installation.start(source.iso, setup.disk)
    installation.wait_until_complete()
    wanted = Wanted(agent_service=AGENT_SERVICE, hvci=setup.hvci, certificate=pfx)
    set_up(installation, wanted, secrets)
    installation.phase("shutting it down")
    installation.shut_down()
    compact(installation.disk, making / DISK, secrets, installation.phase)


def set_up(installation: Installation, wanted: Wanted, secrets: Secrets) -> None:
    """Set a Windows up that is installed, see that all is in force behind a restart, and remove secrets.

    At the next start its kernel waits for a debugger, where its machines have one.
    """
    installation.phase("setting it up")
    with _told_of() as note:
        make_settings(installation.agent, wanted, note)
    installation.phase("restarting it")
    agent = installation.restart()
    off = [reading for reading in read_settings(agent, wanted) if not reading.in_force]
    if off:
        told = "; ".join(f"{r.name} is {r.found}, wanted {r.wanted}" for r in off)
        raise TargetError(f"not in force behind a restart: {told}")
    installation.phase("removing what Setup kept of the password")
    scrub_guest(agent, secrets, installation.phase)
    if not installation.is_debugged:
        return
    installation.phase("switching its kernel's debugger on")
    with _told_of() as note:
        note("kernel debugger")
        switch_debugger_on(agent)


@contextmanager
def _told_of() -> Iterator[Callable[[str], None]]:
    """Have what goes wrong name the setting that was noted last."""
    name = ""

    def note(setting: str) -> None:
        nonlocal name
        name = setting

    try:
        yield note
    except AgentError as error:
        raise TargetError(f"{name} can't be set: {error}") from error


def compact(disk: Path, result: Path, secrets: Secrets, phase: Callable[[str], None]) -> None:
    """Copy a disk to what runs start from: without a secret in it, and compressed."""
    raw = disk.with_suffix(".raw")
    phase("looking through its disk for the password")
    try:
        _convert(disk, raw, "-O", "raw")
        disk.unlink()
        scrub_disk(raw, secrets)
        phase("compressing its disk")
        _convert(raw, result, "-O", "qcow2", "-c", "-o", "compression_type=zstd")
    finally:
        raw.unlink(missing_ok=True)


def _convert(disk: Path, result: Path, *options: str) -> None:
    """By qemu-img, which takes minutes, and ends with us."""
    source = "qcow2" if options[1] == "raw" else "raw"
    command = ["setpriv", "--pdeathsig", "KILL", "qemu-img", "convert", "-f", source, *options]
    done = subprocess.run(
        [*command, str(disk), str(result)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise TargetError(f"the disk could not be copied: {done.stderr.strip()}")


def read_product_key(text: str, where: str) -> str:
    """Check a product key. Raises ``ConfigError``, which does not have it."""
    key = text.strip().upper()
    if not PRODUCT_KEY.fullmatch(key):
        raise ConfigError(f"{where} has no product key: five groups of five letters and digits")
    return key
