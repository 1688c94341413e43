"""How what the documents say of Windows is tried on one: by small drivers, the agent, and what is there.

A trial leaves nothing behind, and harms nothing: it runs on other people's machines. Not verified on Windows.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import AgentError, BuildError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.image.signing import own_certificate, signed_copy
from pytest_kdriver.kernel.events import KernelMessage
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.machine import FOLDER, LastingMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.target import LoadOutcome, NoUnload
from pytest_kdriver.targets.windows.answer_file import AGENT_SERVICE
from pytest_kdriver.targets.windows.exact_status import IMAGE, RETURNED, load_proof
from pytest_kdriver.targets.windows.in_force import (
    CODE_INTEGRITY,
    CodeIntegrity,
    decode_code_integrity,
    examine,
    secure_boot,
)
from pytest_kdriver.targets.windows.kinds import (
    CONTROL,
    INTEGRITY,
    SERVICES,
    Element,
    Setting,
    shown,
)
from pytest_kdriver.targets.windows.settings import DEBUGGER, Wanted, settings
from pytest_kdriver.win32error import Win32Error

SERVICE: Final = "kdriver-self-test"
TIMEOUT: Final = 60.0

IMPORTS: Final = IMAGE.with_name("import.bin")
"""A driver that imports ExAllocatePool2, does nothing, and can be unloaded; the tests make it."""

LOADS: Final = bytes.fromhex("488d0507000000 48894168 31c0 c3 c3")
"""``lea rax, [unload]; mov [rcx+DriverUnload], rax; xor eax, eax; ret; unload: ret``"""

INFORMATIONAL: Final = NTSTATUS(0x40000000)
LOADS_WITH_WORDS: Final = bytes.fromhex("488d050a000000 48894168 b800000040 c3 c3")
"""The same, but for ``mov eax, INFORMATIONAL``."""

STAYS: Final = bytes.fromhex("31c0 c3")
"""``xor eax, eax; ret``: a driver without DriverUnload."""

SETUP_STATE: Final = r"SOFTWARE\Microsoft\Windows\CurrentVersion\Setup\State"

QUOTAS: Final = {"MaxMemoryPerShellMB": "1024", "MaxProcessesPerShell": "25"}
"""Of a shell of WinRM's, as Windows has them at first."""

_QUOTA: Final = re.compile(rf"^\s*({'|'.join(QUOTAS)})\s*=\s*(\d+)", re.MULTILINE)

POOL2_BUILD: Final = 19041
"""Windows 10 2004."""

_TEXT: Final = IMAGE.read_bytes().index(bytes.fromhex("b83412dec0c3"))
"""Where an image's code is in its file."""

_CHECKSUM: Final = 0x84 + 20 + 64
"""Where its checksum is."""


class Verdict(Enum):
    """What came of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial, and what was seen, or why it was not made."""

    verdict: Verdict
    seen: str


@dataclass(frozen=True, slots=True)
class Workbench:
    """What trials have at hand. ``samples`` finds a sample driver's image; ``BuildError`` where it can't."""

    target: MachineTarget
    folder: Path
    samples: Callable[[str], Path]

    @property
    def agent(self) -> Agent:
        """The target's."""
        return self.target.agent

    @property
    def on_wine(self) -> bool:
        """Whether the guest is no Windows."""
        return self.agent.info.wine_version is not None

    def image(self, code: bytes) -> Path:
        """A driver with this code in its DriverEntry; nobody has signed it."""
        content = bytearray(IMAGE.read_bytes())
        content[_TEXT : _TEXT + len(code)] = code
        return self._written(bytes(content))

    def importing(self, name: bytes) -> Path:
        """A driver that imports the kernel's function ``name``, of 15 letters."""
        return self._written(IMPORTS.read_bytes().replace(b"ExAllocatePool2", name))

    def _written(self, content: bytes) -> Path:
        path = self.folder / f"{SERVICE}.sys"
        path.write_bytes(content)
        return path

    def signed(self, image: Path) -> bytes:
        """The image as a Windows takes it."""
        return signed_copy(image, self.folder / "signed").read_bytes()

    def load(self, image: Path) -> LoadOutcome:
        """Load it as a test does, signed where that is needed, and unload it if it is there."""
        target = self.target
        target.install(SERVICE, image, {}, TIMEOUT)
        try:
            outcome = target.load(SERVICE, TIMEOUT)
            if outcome.loaded:
                target.unload(SERVICE, TIMEOUT)
        finally:
            target.uninstall(SERVICE, TIMEOUT)
        return outcome

    @contextmanager
    def registered(self, content: bytes) -> Iterator[str]:
        """Put ``content`` there as it is, as the image of a service; its path. All is removed behind it."""
        path = f"{FOLDER}\\self-test\\{SERVICE}.sys"
        agent = self.agent
        agent.put(content, path)
        try:
            agent.create_service(SERVICE, path)
            try:
                yield path
            finally:
                with suppress(AgentError):
                    agent.unload_driver(SERVICE)
                with suppress(AgentError):
                    agent.delete_service(SERVICE)
        finally:
            agent.delete(path)
            agent.run(["cmd.exe", "/c", "rmdir", path.rpartition("\\")[0]])


Trial = Callable[[Workbench], Outcome]


def holds(condition: bool, seen: object) -> Outcome:
    """The claim holds, or does not; what was seen."""
    return Outcome(Verdict.HOLDS if condition else Verdict.FAILS, str(seen))


def untried(why: str) -> Outcome:
    """It was not tried."""
    return Outcome(Verdict.NOT_TRIED, why)


# --- the agent and the machine ------------------------------------------------------------------------


def the_agent_answers(bench: Workbench) -> Outcome:
    """That it does, and may load drivers."""
    info = bench.agent.info
    return holds(info.elevated, f"{bench.target.describe()}; elevated: {info.elevated}")


def a_virtual_machine_runs(bench: Workbench) -> Outcome:
    """That it runs, and is put back without being made anew."""
    target = bench.target
    if isinstance(target.machine, LastingMachine) or "snapshots" not in target.capabilities:
        return untried("this target is no virtual machine with snapshots")
    position = len(target.log)
    generation = target.generation
    bench.agent.query_service(SERVICE)
    target.revert()
    told = [
        event.text
        for event in target.log.window(None, position).of(KernelMessage)
        if "made anew" in event.text
    ]
    back = target.generation == generation + 1 and not told
    return holds(back, "; ".join(told) or f"{target.describe()}: it was put back")


def the_placed_agent_runs(bench: Workbench) -> Outcome:
    """That a remote machine's agent is the file that was brought there, by its name with a hash."""
    if not isinstance(bench.target.machine, LastingMachine):
        return untried("this target is no remote machine")
    name = ancestors(bench.agent)[0]
    return holds("-" in name, f"it runs as {name}")


def the_agent_is_started_by(server: str) -> Trial:
    """That it answers as a child of the process ``server``, however far down."""

    def trial(bench: Workbench) -> Outcome:
        names = ancestors(bench.agent)
        if server not in (name.lower() for name in names):
            return untried(f"this target's agent is not started by {server}")
        return holds(True, " of ".join(names))

    return trial


def winrm_has_its_quotas(bench: Workbench) -> Outcome:
    """That a shell of WinRM's has the quotas that Microsoft's documentation names."""
    done = bench.agent.run(["cmd.exe", "/c", "winrm", "get", "winrm/config/winrs"])
    told = dict(_QUOTA.findall(done.stdout.decode(errors="replace")))
    if not told:
        return untried(f"winrm tells nothing of them (it ended with {done.exit_code})")
    return holds(told == QUOTAS, ", ".join(f"{name} {told[name]}" for name in sorted(told)))


def ancestors(agent: Agent) -> list[str]:
    """The names of the agent's process, its parent's, and so on, as far as they run."""
    processes = {process.pid: process for process in agent.processes()}
    names = []
    pid = agent.info.pid
    while (process := processes.pop(pid, None)) is not None:
        names.append(process.name)
        pid = process.parent
    return names or ["(not among the processes)"]


def kdriver_installed_it(bench: Workbench) -> Outcome:
    """That it has the agent's service, and says that its Setup is over."""
    agent = bench.agent
    service = agent.get_value(f"{SERVICES}\\{AGENT_SERVICE}", "ImagePath")
    if service is None:
        return untried("kdriver image build has not installed this machine")
    state = agent.get_value(SETUP_STATE, "ImageState")
    return holds(
        state == "IMAGE_STATE_COMPLETE", f"ImageState {shown(state)}, the service {shown(service)}"
    )


def a_clone_boots_by_uefi(bench: Workbench) -> Outcome:
    """That a machine that kdriver installed, and that has UEFI, came up with new variables."""
    agent = bench.agent
    if agent.get_value(f"{SERVICES}\\{AGENT_SERVICE}", "ImagePath") is None:
        return untried("kdriver image build has not installed this machine")
    firmware = agent.get_value(CONTROL, "PEFirmwareType")
    if firmware != 2:
        return untried(f"it has no UEFI (PEFirmwareType {shown(firmware)})")
    return holds(True, "it runs, and PEFirmwareType is 2")


# --- loading ------------------------------------------------------------------------------------------


def a_status_is_exact(bench: Workbench) -> Outcome:
    """That 0xC0DE1234 comes back."""
    outcome = load_proof(bench.target, bench.folder)
    return holds(outcome.status == RETURNED, f"it came back as {outcome.status}")


def a_driver_loads_and_unloads(bench: Workbench) -> Outcome:
    """That one without imports does, by NtLoadDriver where there is one."""
    outcome = bench.load(bench.image(LOADS))
    return holds(outcome.loaded, f"{outcome.status}, then it was unloaded")


def a_success_code_is_success(bench: Workbench) -> Outcome:
    """That a DriverEntry may return another one than STATUS_SUCCESS."""
    outcome = bench.load(bench.image(LOADS_WITH_WORDS))
    return holds(outcome.loaded, f"it returned {INFORMATIONAL}: {outcome.status}")


def a_missing_import_is_refused(bench: Workbench) -> Outcome:
    """That a driver does not load whose import no kernel has."""
    outcome = bench.load(bench.importing(b"KdriverHasNone2"))
    return holds(not outcome.loaded and not outcome.status.is_success, outcome.status)


def the_newer_pool_is_there(bench: Workbench) -> Outcome:
    """That ExAllocatePool2 is exported from Windows 10 2004 on, and not before."""
    outcome = bench.load(bench.importing(b"ExAllocatePool2"))
    build = bench.agent.info.os_version[2]
    return holds(outcome.loaded == (build >= POOL2_BUILD), f"{outcome.status} on build {build}")


def no_unload_is_told(bench: Workbench) -> Outcome:
    """That a driver without DriverUnload is not unloaded, and how that is told."""
    target = bench.target
    if "snapshots" not in target.capabilities:
        return untried("it would stay there until a restart: this target can't be put back")
    target.install(SERVICE, bench.image(STAYS), {}, TIMEOUT)
    try:
        outcome = target.load(SERVICE, TIMEOUT)
        told: object = target.unload(SERVICE, TIMEOUT)
    except NoUnload:
        told = NTSTATUS.STATUS_INVALID_DEVICE_REQUEST
    finally:
        target.break_down("a driver was loaded there that can't be unloaded")
        target.repair()
    refused = told is NTSTATUS.STATUS_INVALID_DEVICE_REQUEST
    return holds(outcome.loaded and refused, f"loaded: {outcome.status}; unloaded: {told}")


# --- refusals -----------------------------------------------------------------------------------------


def an_unsigned_driver_is_refused(bench: Workbench) -> Outcome:
    """That nobody's driver is refused with the code that pre-flight tells."""
    with bench.registered(bench.image(LOADS).read_bytes()):
        status = bench.agent.load_driver(SERVICE)
    return holds(status == NTSTATUS.STATUS_INVALID_IMAGE_HASH, status)


def the_manager_says_577(bench: Workbench) -> Outcome:
    """That the service manager says ERROR_INVALID_IMAGE_HASH to the same."""
    with bench.registered(bench.image(LOADS).read_bytes()):
        code = bench.agent.start_service(SERVICE)
        bench.agent.stop_service(SERVICE)
    return holds(code == Win32Error.ERROR_INVALID_IMAGE_HASH, code)


def a_changed_driver_is_refused(bench: Workbench) -> Outcome:
    """That one is that was changed behind its signature."""
    content = bytearray(bench.signed(bench.image(LOADS)))
    content[_TEXT + len(LOADS)] ^= 0xFF
    with bench.registered(bytes(content)):
        status = bench.agent.load_driver(SERVICE)
    return holds(status == NTSTATUS.STATUS_INVALID_IMAGE_HASH, status)


def a_wrong_checksum_is_refused(bench: Workbench) -> Outcome:
    """That one is whose checksum, which no signature is about, is another."""
    content = bytearray(bench.signed(bench.image(LOADS)))
    content[_CHECKSUM] ^= 0xFF
    with bench.registered(bytes(content)):
        status = bench.agent.load_driver(SERVICE)
    return holds(not status.is_success, status)


def a_loaded_image_is_in_use(bench: Workbench) -> Outcome:
    """That a driver's file can't be replaced while it is loaded."""
    with bench.registered(bench.signed(bench.image(LOADS))) as path:
        loaded = bench.agent.load_driver(SERVICE)
        try:
            bench.agent.put(b"another", path)
        except AgentError as error:
            code: object = error.code
        else:
            code = "it was replaced"
        bench.agent.unload_driver(SERVICE)
    wanted = (Win32Error.ERROR_SHARING_VIOLATION, Win32Error.ERROR_USER_MAPPED_FILE)
    return holds(loaded.is_success and code in wanted, code)


def a_second_load_is_told(bench: Workbench) -> Outcome:
    """That a driver that is loaded is not loaded again, by either way."""
    with bench.registered(bench.signed(bench.image(LOADS))):
        bench.agent.load_driver(SERVICE)
        status = bench.agent.load_driver(SERVICE)
        code = bench.agent.start_service(SERVICE)
        bench.agent.unload_driver(SERVICE)
    return holds(
        status == NTSTATUS.STATUS_IMAGE_ALREADY_LOADED
        and code == Win32Error.ERROR_SERVICE_ALREADY_RUNNING,
        f"{status}; {code}",
    )


def a_service_is_marked_for_deletion(bench: Workbench) -> Outcome:
    """That a service that is deleted while its driver runs stays until that is stopped."""
    with bench.registered(bench.signed(bench.image(LOADS))) as path:
        bench.agent.load_driver(SERVICE)
        bench.agent.delete_service(SERVICE)
        try:
            bench.agent.create_service(SERVICE, path)
        except AgentError as error:
            code: object = error.code
        else:
            code = "it was created again"
        bench.agent.unload_driver(SERVICE)
    return holds(code == Win32Error.ERROR_SERVICE_MARKED_FOR_DELETE, code)


def secure_boot_forbids_test_signing(bench: Workbench) -> Outcome:
    """That where Secure Boot is on, test signing is not in force."""
    options = decode_code_integrity(bench.agent.system_information(CODE_INTEGRITY))
    if not secure_boot(bench.agent):
        return untried("Secure Boot is off there, as it has to be")
    return holds(CodeIntegrity.TESTSIGN not in options, f"code integrity {options:#x}")


def certutil_takes_the_certificate(bench: Workbench) -> Outcome:
    """That it reads PEM."""
    path = f"{FOLDER}\\self-test\\certificate.cer"
    bench.agent.put(own_certificate().path, path)
    try:
        done = bench.agent.run(["certutil.exe", "-dump", path])
    finally:
        bench.agent.delete(path)
    return holds(done.exit_code == 0, f"certutil -dump ended with {done.exit_code}")


# --- settings -----------------------------------------------------------------------------------------


def the_boot_setting_is_in_force(bench: Workbench) -> Outcome:
    """That the registry's element says what the kernel does."""
    found = Element("{default}", 0x16000049, "testsigning", 1).found(bench.agent)
    options = decode_code_integrity(bench.agent.system_information(CODE_INTEGRITY))
    runs = CodeIntegrity.TESTSIGN in options
    return holds(runs == bool(found), f"element 16000049 is {found}, code integrity {options:#x}")


def told_of(name: str) -> Trial:
    """That a Windows tells whether ``name`` is in force."""

    def trial(bench: Workbench) -> Outcome:
        fact = next(f for f in examine(bench.agent, kernel_log=False) if f.name == name)
        return holds(not fact.found.startswith("can't be told"), fact.found)

    return trial


def reads_back(name: str) -> Trial:
    """That a setting that was made is read back. None is made here."""

    def trial(bench: Workbench) -> Outcome:
        reading = _setting(bench.agent, name).read(bench.agent)
        if reading.in_force:
            return holds(True, reading.found)
        return untried(f"this machine is not set so: {reading.found}")

    return trial


def _setting(agent: Agent, name: str) -> Setting:
    hvci = agent.get_value(INTEGRITY, "Enabled") == 1
    wanted = Wanted(agent_service=AGENT_SERVICE, hvci=hvci)
    return next(s for s in (*settings(wanted), DEBUGGER) if s.name == name)


# --- the framework ------------------------------------------------------------------------------------


def a_sample_loads(name: str) -> Trial:
    """That a sample driver loads and unloads."""

    def trial(bench: Workbench) -> Outcome:
        try:
            built = bench.samples(name)
        except BuildError as error:
            return untried(f"it can't be built here: {str(error).partition(chr(10))[0]}")
        image = bench.folder / f"{SERVICE}.sys"
        shutil.copyfile(built, image)
        outcome = bench.load(image)
        return holds(outcome.loaded, f"{outcome.status}, then it was unloaded")

    return trial
