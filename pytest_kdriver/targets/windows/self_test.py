"""What the documents say of Windows and no Windows has shown yet, each with how it is tried on one.

A test holds this to the documents: each place there that is marked "not verified on Windows", and each row of
the tables below such a mark, has a claim here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_kdriver.errors import KdriverError
from pytest_kdriver.image.signing import SigningError
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.target import CallTimeout, NoUnload
from pytest_kdriver.targets.windows import kernel_log_trials, trials
from pytest_kdriver.targets.windows.answer_file import AGENT_SERVICE
from pytest_kdriver.targets.windows.settings import DEBUGGER, Wanted, settings
from pytest_kdriver.targets.windows.trials import (
    Outcome,
    Trial,
    Verdict,
    Workbench,
    told_of,
    untried,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim: ``text``, the document and heading that it stands at, and ``trial``, or why there is none.

    ``row`` is what the first cell of its table's row says, "" where it stands in none. ``on_wine``: a Wine
    can show it as well.
    """

    text: str
    where: str
    trial: Trial | str
    how: str = ""
    row: str = ""
    on_wine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a claim."""

    claim: Claim
    outcome: Outcome


REMOTE: Final = "docs/remote.md#when-something-goes-wrong"
KERNEL_LOG: Final = "docs/kernel-log.md#not-verified-on-windows"
SIGNING: Final = "docs/signing.md#not-verified-on-windows"
WINE: Final = "docs/targets.md#wine"
SETTINGS: Final = "docs/windows.md#settings"
IN_FORCE: Final = "docs/windows.md#in-force"

_TAKES_A_DEVICE: Final = (
    "takes a driver with a device: tests/drivers, run with this target, show it"
)
_PRINTS: Final = (
    'takes a driver that prints so: a test of your own, with kernel_log = "kd", shows it'
)
_INSTALLED: Final = "kdriver image build shows it"
_UNTIL_RESTART: Final = "would take the machine down, or need a restart of it"

_PLACES: Final = (
    Claim(
        text="the agent runs there, and may load drivers",
        where="README.md#limits",
        how="its greeting",
        trial=trials.the_agent_answers,
        on_wine=True,
    ),
    Claim(
        text="kdriver check --windows: what it finds nothing in, loads",
        where="docs/writing-tests.md#the-command-kdriver",
        how="loading a signed driver that it finds nothing in",
        trial=trials.a_driver_loads_and_unloads,
        on_wine=True,
    ),
    Claim(
        text="a nightly with a Windows disk",
        where="docs/ci.md#what-was-tried",
        trial="a nightly of yours shows it",
    ),
    Claim(
        text="the agent that a remote machine runs is the file that was brought there",
        where="docs/remote.md#remote-machines",
        how="the name of the agent's process",
        trial=trials.the_placed_agent_runs,
    ),
    Claim(
        text="OpenSSH is installed and started by these lines",
        where="docs/remote.md#a-first-run-by-ssh",
        trial="it is there, or it is not: nothing is installed by a self-test",
    ),
    Claim(
        text="WinRM listens, and lets an administrator in, behind these lines",
        where="docs/remote.md#a-first-run-by-winrm",
        how="the agent, which a shell of WinRM's has started",
        trial=trials.the_agent_is_started_by("winrshost.exe"),
    ),
    Claim(
        text="PowerShell brings the agent's file there over WinRM",
        where="docs/remote.md#the-agent",
        how="the agent, which came so where a shell of WinRM's has started it",
        trial=trials.the_agent_is_started_by("winrshost.exe"),
    ),
    Claim(
        text="a shell of WinRM's has 1024 MB and 25 processes",
        where="docs/remote.md#the-agent",
        how="winrm get winrm/config/winrs",
        trial=trials.winrm_has_its_quotas,
    ),
    Claim(
        text="SFTP calls C:\\kdriver /C:/kdriver",
        where="docs/remote.md#the-agent",
        how="the agent, which came by SFTP and was started by the SSH server",
        trial=trials.the_agent_is_started_by("sshd.exe"),
    ),
    Claim(
        text="the agent is started by WinRM, and its streams carry all byte values",
        where="docs/targets.md#winrm",
        how="the agent, which a shell of WinRM has started, and which was sent all values before",
        trial=trials.the_agent_is_started_by("winrshost.exe"),
    ),
    Claim(
        text="a Windows runs under libvirt, is saved, and is put back",
        where="docs/targets.md#a-disk-of-your-own",
        how="a revert",
        trial=trials.a_virtual_machine_runs,
    ),
    Claim(
        text="a Windows goes on from where another one had booted to",
        where="docs/targets.md#warm-starts",
        trial="a second run shows it: it begins within seconds, and tells if it boots instead",
    ),
    Claim(
        text="the sample drivers load and unload; here: hello",
        where="drivers/README.md#what-is-verified-where",
        how="building and loading it",
        trial=trials.a_sample_loads("hello"),
        on_wine=True,
    ),
    Claim(
        text="a driver that allocates by the framework loads and unloads: leaks",
        where="drivers/README.md#what-is-verified-where",
        how="building and loading it",
        trial=trials.a_sample_loads("leaks"),
        on_wine=True,
    ),
    Claim(
        text="Driver Verifier sees what the framework allocates",
        where="drivers/README.md#what-is-verified-where",
        trial="takes Driver Verifier, which is switched on by a restart",
    ),
    Claim(
        text="the framework links by Microsoft's link.exe",
        where="drivers/README.md#what-is-verified-where",
        trial="takes the tools of Microsoft's",
    ),
    Claim(
        text="a Windows of your own with the agent in it is a target",
        where="examples/driver-repository/kdriver.toml",
        how="its greeting",
        trial=trials.the_agent_answers,
    ),
    Claim(
        text="kdriver image build installs it by nobody's hand",
        where="docs/windows-images.md#disk-images-of-windows",
        how="what Setup says of itself, and the agent's service",
        trial=trials.kdriver_installed_it,
    ),
    Claim(
        text="WinRM lets the user of an image in by its password, to start the agent where the image has it",
        where="docs/windows-images.md#secrets",
        how="the agent, which a shell of WinRM has started",
        trial=trials.the_agent_is_started_by("winrshost.exe"),
    ),
    Claim(
        text="a clone of it boots by UEFI with new variables",
        where="docs/windows-images.md#while-it-installs",
        how="PEFirmwareType of a machine that runs",
        trial=trials.a_clone_boots_by_uefi,
    ),
    *(
        Claim(text=text, where="docs/windows-images.md#while-it-installs", trial=_INSTALLED)
        for text in (
            "keys answer the question before the CD is booted",
            "Setup takes virtio's drivers from $WinPEDriver$",
            "Windows 11's Setup heeds LabConfig",
        )
    ),
    Claim(
        text="the recipes of Windows make an image each",
        where="vm/images/README.md#disk-images",
        how="what Setup says of itself, and the agent's service",
        trial=trials.kdriver_installed_it,
    ),
    Claim(
        text="what bcdedit writes is what the kernel does behind the next restart",
        where="docs/windows.md#a-windows-for-tests",
        how="the element of test signing in the registry, and the kernel's own word",
        trial=trials.the_boot_setting_is_in_force,
    ),
    Claim(
        text="the self-test runs on a Windows",
        where="docs/windows.md#the-first-hour",
        how="running it",
        trial=lambda bench: trials.holds(not bench.on_wine, bench.target.describe()),
    ),
)

_REFUSALS: Final = (
    Claim(
        text="the file of a driver that is loaded can't be replaced",
        where=REMOTE,
        row="ERROR_SHARING_VIOLATION, ERROR_USER_MAPPED_FILE",
        how="putting another file over it",
        trial=trials.a_loaded_image_is_in_use,
    ),
    Claim(
        text="a service whose driver runs is marked for deletion",
        where=REMOTE,
        row="ERROR_SERVICE_MARKED_FOR_DELETE",
        how="deleting and creating it while its driver is loaded",
        trial=trials.a_service_is_marked_for_deletion,
    ),
    Claim(
        text="a driver that is loaded is not loaded again",
        where=REMOTE,
        row="STATUS_IMAGE_ALREADY_LOADED, ERROR_SERVICE_ALREADY_RUNNING",
        how="loading it again, by NtLoadDriver and by the service manager",
        trial=trials.a_second_load_is_told,
    ),
    Claim(
        text="an unload that is pended succeeds, and the service is not STOPPED",
        where=REMOTE,
        row="an unload that succeeds, and the service is not STOPPED within 5 s",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="a full disk is ERROR_DISK_FULL",
        where=REMOTE,
        row="ERROR_DISK_FULL",
        trial="would fill the machine's disk",
    ),
)

_SIGNING: Final = (
    Claim(
        text="with test-signing on, a driver loads that anybody's certificate has signed",
        where=SIGNING,
        row="drivers have to be signed; with test-signing on by any certificate",
        how="loading one that is signed by the user's",
        trial=trials.a_driver_loads_and_unloads,
    ),
    Claim(
        text="Secure Boot has to be off for it",
        where=SIGNING,
        row="Secure Boot has to be off for it",
        how="SystemSecureBootInformation and SystemCodeIntegrityInformation",
        trial=trials.secure_boot_forbids_test_signing,
    ),
    Claim(
        text="the two stores are for driver packages",
        where=SIGNING,
        row="the two stores",
        trial="takes a driver package, and certificates that would be left in the machine's stores",
    ),
    Claim(
        text="certutil takes PEM",
        where=SIGNING,
        row="that certutil takes PEM",
        how="certutil -dump",
        trial=trials.certutil_takes_the_certificate,
    ),
    Claim(
        text="what nobody signed is refused with STATUS_INVALID_IMAGE_HASH",
        where=SIGNING,
        row="`STATUS_INVALID_IMAGE_HASH`",
        how="NtLoadDriver of an unsigned driver",
        trial=trials.an_unsigned_driver_is_refused,
    ),
    Claim(
        text="what was changed behind its signature is refused with STATUS_INVALID_IMAGE_HASH",
        where=SIGNING,
        row="`STATUS_INVALID_IMAGE_HASH`",
        how="NtLoadDriver of a signed driver with a byte changed",
        trial=trials.a_changed_driver_is_refused,
    ),
    Claim(
        text="the service manager says 577 to it",
        where=SIGNING,
        row="577",
        how="starting an unsigned driver by it",
        trial=trials.the_manager_says_577,
    ),
    Claim(
        text="a debugger lifts all this, unless CI\\DebugFlags is 0x10",
        where=SIGNING,
        row="a debugger lifts all this",
        trial="would load what nobody signed",
    ),
    Claim(
        text="an embedded signature is enough",
        where=SIGNING,
        row="an embedded signature is enough",
        how="loading a driver without a catalog",
        trial=trials.a_driver_loads_and_unloads,
    ),
)

_UNLIKE_WINE: Final = (
    Claim(
        text="drivers are loaded by NtLoadDriver",
        where=WINE,
        row="loading",
        how="loading and unloading one",
        trial=trials.a_driver_loads_and_unloads,
    ),
    Claim(
        text="DriverEntry's status is exact",
        where=WINE,
        row="DriverEntry's status",
        how="loading a driver that returns 0xC0DE1234",
        trial=trials.a_status_is_exact,
        on_wine=True,
    ),
    Claim(
        text="a driver that returns another success code is loaded",
        where=WINE,
        row="a success code other than STATUS_SUCCESS",
        how="loading one that returns 0x40000000",
        trial=trials.a_success_code_is_success,
    ),
    Claim(
        text="an import that the kernel lacks does not load",
        where=WINE,
        row="an import that the kernel lacks",
        how="loading a driver with one",
        trial=trials.a_missing_import_is_refused,
    ),
    Claim(
        text="a signature is required",
        where=WINE,
        row="signature, checksum",
        how="NtLoadDriver of an unsigned driver",
        trial=trials.an_unsigned_driver_is_refused,
    ),
    Claim(
        text="a right checksum is required",
        where=WINE,
        row="signature, checksum",
        how="NtLoadDriver of a signed driver with another",
        trial=trials.a_wrong_checksum_is_refused,
    ),
    Claim(
        text="one driver hangs in DriverEntry, and others start",
        where=WINE,
        row="one driver hangs in DriverEntry",
        trial=_UNTIL_RESTART,
    ),
    Claim(
        text="a bug check ends everything",
        where=WINE,
        row="a bug check or a page fault",
        trial=_UNTIL_RESTART,
    ),
    Claim(
        text="ExAllocatePool2 is there from Windows 10 2004 on",
        where=WINE,
        row="`ExAllocatePool2`",
        how="loading a driver that imports it",
        trial=trials.the_newer_pool_is_there,
    ),
    Claim(
        text="a DbgPrint is cut at 512 bytes",
        where=WINE,
        row="a DbgPrint of more than 950 bytes",
        trial=_PRINTS,
    ),
    Claim(
        text="a print without a newline gets none",
        where=WINE,
        row="a print without a newline",
        trial=_PRINTS,
    ),
    Claim(
        text="what IRP_MJ_CREATE answers fails the open",
        where=WINE,
        row="what `IRP_MJ_CREATE` answers",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="IRP_MJ_CLEANUP and IRP_MJ_CLOSE both come before the close returns",
        where=WINE,
        row="`IRP_MJ_CLEANUP`, `IRP_MJ_CLOSE`",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="a driver's requests come at once",
        where=WINE,
        row="a driver's requests",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="an unload waits for open handles",
        where=WINE,
        row="an unload with open handles",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="an unload right after a close does not overtake its IRP_MJ_CLOSE",
        where=WINE,
        row="an unload right after a close",
        trial=_TAKES_A_DEVICE,
    ),
    Claim(
        text="of a driver that died nothing is left to ask",
        where=WINE,
        row="a device whose driver died",
        trial=_UNTIL_RESTART,
    ),
    Claim(
        text="a driver without DriverUnload is not unloaded: STATUS_INVALID_DEVICE_REQUEST",
        where=WINE,
        how="loading one, where the machine is put back behind it",
        trial=trials.no_unload_is_told,
    ),
)

_KERNEL_LOG: Final = tuple(
    Claim(
        text=text,
        where=KERNEL_LOG,
        row=text,
        how="" if isinstance(trial, str) else how,
        trial=trial,
    )
    for text, how, trial in (
        (
            "the kernel answers its debugger on COM1",
            "meeting it",
            kernel_log_trials.the_kernel_answers,
        ),
        (
            "each DbgPrint is told before its call returns",
            "loading hello",
            kernel_log_trials.a_print_is_told,
        ),
        (
            "each load and unload of a driver is told with base and size",
            "loading a driver",
            kernel_log_trials.an_image_is_told,
        ),
        (
            "a driver's int 3 is stepped over, and told",
            "loading a driver that has one",
            kernel_log_trials.a_breakpoint_is_told,
        ),
        (
            "a break-in tells where each processor is",
            "breaking in",
            kernel_log_trials.processors_are_told,
        ),
        (
            "a crash is told with its bug check, and the guest put back",
            "loading a driver that writes to address 0",
            kernel_log_trials.a_crash_is_told,
        ),
        (
            "the pool is counted by tags, in the form that is read here",
            "asking for them",
            kernel_log_trials.pool_counters_are_told,
        ),
        (
            "a kernel that is let go on writes its minidump and starts again",
            "",
            "takes minutes: a test that crashes, with --kdriver-dumps, shows it",
        ),
        (
            "a minidump, and a kernel dump, have the form that `kdriver dump` reads",
            "",
            "it takes a crash",
        ),
        (
            "the panic device is told of a bug check",
            "",
            "the debugger is told before it",
        ),
        (
            "a kernel without its debugger waits some seconds at a print, and at an exception or a bug check "
            "until there is one",
            "",
            "it would hang",
        ),
        (
            "COM2 stays COM2 when the debugger takes COM1",
            "",
            "an agent at COM2 shows it",
        ),
    )
)

_SETTINGS: Final = tuple(
    Claim(
        text=f"{setting.name}: it is made, and read back",
        where=SETTINGS,
        row=setting.name,
        how="reading it, where it was made",
        trial=trials.reads_back(setting.name),
    )
    for setting in (*settings(Wanted(agent_service=AGENT_SERVICE)), DEBUGGER)
)

_ASSERTED: Final = tuple(
    Claim(
        text=f"{name}: the Windows tells whether it is in force",
        where=IN_FORCE,
        row=name,
        how="what is asserted at each start",
        trial=told_of(name),
    )
    for name in (
        "test signing",
        "debug print filter",
        "memory integrity",
        "signatures beside a debugger",
        "crash dumps",
        "clock",
        "free disk",
    )
)

CLAIMS: Final = (
    *_PLACES,
    *_UNLIKE_WINE,
    *_SIGNING,
    *_REFUSALS,
    *_ASSERTED,
    *_SETTINGS,
    *_KERNEL_LOG,
)
"""All, in the order in which they are tried."""


def self_test(target: MachineTarget, samples: Callable[[str], Path]) -> Iterator[Result]:
    """Try each claim on ``target``, which runs. ``samples`` finds a sample driver's image, or ``BuildError``.

    What goes wrong in a trial is its outcome. Where the target itself is lost, the rest is not tried.
    """
    with tempfile.TemporaryDirectory(prefix="kdriver-") as folder:
        bench = Workbench(target, Path(folder), samples)
        lost: str | None = None
        for claim in CLAIMS:
            outcome = _tried(claim, bench) if lost is None else untried(lost)
            yield Result(claim=claim, outcome=outcome)
            if lost is None:
                lost = _mended(target, claim)


def _tried(claim: Claim, bench: Workbench) -> Outcome:
    if isinstance(claim.trial, str):
        return untried(claim.trial)
    try:
        if bench.on_wine and not claim.on_wine:
            return untried("only a Windows shows it, and this is Wine")
        return claim.trial(bench)
    except SigningError as error:
        return untried(f"nothing can be signed here: {error}")
    except NoUnload:
        return Outcome(Verdict.FAILS, "it can't be unloaded")
    except (KdriverError, CallTimeout, TimeoutError, OSError) as error:
        return Outcome(Verdict.FAILS, f"{type(error).__name__}: {error}")


def _mended(target: MachineTarget, claim: Claim) -> str | None:
    """Put the target back if the claim's trial broke it; why that can't be, or None."""
    try:
        target.repair()
    except KdriverError as error:
        return f"the target was lost in the trial of {claim.text!r}: {error}"
    return None
