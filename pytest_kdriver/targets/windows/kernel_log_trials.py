"""How what the documents say of a kernel's debugger is tried on a Windows that has one.

Not verified on Windows.
"""

from __future__ import annotations

import shutil
from typing import Final

from pytest_kdriver.errors import BuildError
from pytest_kdriver.kernel.events import (
    Breakpoint,
    BugCheck,
    DebugPrint,
    ImageLoaded,
    ImageUnloaded,
    ProcessorState,
)
from pytest_kdriver.kernel.log import Window
from pytest_kdriver.kernel.pool_tags import SYSTEM_POOL_TAG_INFORMATION, decode
from pytest_kdriver.targets.kd_pump import KdPump
from pytest_kdriver.targets.windows.trials import (
    LOADS,
    SERVICE,
    TIMEOUT,
    Outcome,
    Workbench,
    holds,
    untried,
)

BREAKS: Final = bytes.fromhex("cc 488d0507000000 48894168 31c0 c3 c3")
"""``int 3``, then a driver that can be unloaded: ``trials.LOADS``."""

CRASHES: Final = bytes.fromhex("31c0 8800 c3")
"""``xor eax, eax; mov [rax], al; ret``"""

_KERNEL_S_OWN: Final = ("File", "Irp ", "Proc", "Thre")
"""Tags of every Windows', by Microsoft's pooltag.txt."""

_NO_DEBUGGER: Final = (
    'this target\'s kernel has no debugger: kernel_log = "kd", in a virtual machine'
)
_CRASH_TIMEOUT: Final = 10.0


def the_kernel_answers(bench: Workbench) -> Outcome:
    """That it was met on its port, and serves it."""
    feed = bench.target.guest.feed
    if not isinstance(feed, KdPump):
        return untried(_NO_DEBUGGER)
    return holds(feed.failure is None, feed.failure or "it was met, and goes on")


def a_print_is_told(bench: Workbench) -> Outcome:
    """That what the sample driver ``hello`` prints is there when its calls have returned."""
    window = _window(bench)
    if isinstance(window, Outcome):
        return window
    try:
        built = bench.samples("hello")
    except BuildError as error:
        return untried(f"it can't be built here: {str(error).partition(chr(10))[0]}")
    image = bench.folder / f"{SERVICE}.sys"
    shutil.copyfile(built, image)
    bench.load(image)
    lines = [line for event in window.of(DebugPrint) for line in event.lines]
    ours = [line for line in lines if line in {"Hello, world!", "Bye bye!"}]
    return holds(ours == ["Hello, world!", "Bye bye!"], f"{len(lines)} lines, {ours} among them")


def an_image_is_told(bench: Workbench) -> Outcome:
    """That a driver's load and unload are told, with its base and size."""
    window = _window(bench)
    if isinstance(window, Outcome):
        return window
    bench.load(bench.image(LOADS))
    loaded = [event for event in window.of(ImageLoaded) if event.driver == SERVICE]
    gone = [event for event in window.of(ImageUnloaded) if event.driver == SERVICE]
    seen = ", ".join(f"{e.path} at 0x{e.base:X}, {e.size} bytes" for e in loaded) or "no load"
    return holds(len(loaded) == 1 == len(gone), f"{seen}; {len(gone)} unloads")


def a_breakpoint_is_told(bench: Workbench) -> Outcome:
    """That a driver's int 3 is told where it is, and stepped over."""
    window = _window(bench)
    if isinstance(window, Outcome):
        return window
    outcome = bench.load(bench.image(BREAKS))
    told = [event.driver for event in window.of(Breakpoint)]
    return holds(told == [SERVICE] and outcome.loaded, f"of {told}; the load: {outcome.status}")


def processors_are_told(bench: Workbench) -> Outcome:
    """That a break-in tells where each is, and the kernel goes on."""
    feed = bench.target.guest.feed
    if not isinstance(feed, KdPump):
        return untried(_NO_DEBUGGER)
    window = bench.target.log.window(None)
    feed.break_in(TIMEOUT)
    bench.agent.query_service(SERVICE)
    told = [f"0x{state.address:X}" for state in window.of(ProcessorState)]
    return holds(bool(told), f"{len(told)} processors, at {', '.join(told)}")


def a_crash_is_told(bench: Workbench) -> Outcome:
    """That a driver that writes to address 0 is told with its bug check, and the guest put back."""
    target = bench.target
    if "snapshots" not in target.capabilities:
        return untried("it would take the machine down: this target can't be put back")
    window = _window(bench)
    if isinstance(window, Outcome):
        return window
    target.install(SERVICE, bench.image(CRASHES), {}, TIMEOUT)
    try:
        future = bench.agent.submit_start(SERVICE)
        found = window.wait_for(lambda _, event: isinstance(event, BugCheck), _CRASH_TIMEOUT)
        future.cancel()
    finally:
        target.break_down("a driver was to crash there")
    crash = found[1] if found is not None else None
    if not isinstance(crash, BugCheck):
        return holds(False, f"no bug check was told within {_CRASH_TIMEOUT:g} s")
    values = ", ".join(f"0x{value:X}" for value in crash.parameters)
    return holds(True, f"0x{crash.code:X} ({values}), {len(crash.stack)} return addresses")


def pool_counters_are_told(bench: Workbench) -> Outcome:
    """That the kernel counts its pool by tags, in the form that is read here."""
    uses = decode(bench.agent.system_information(SYSTEM_POOL_TAG_INFORMATION), _KERNEL_S_OWN)
    told = ", ".join(f"{use.tag.decode()} {use.blocks}" for use in uses if use.blocks)
    return holds(bool(told), f"blocks of the kernel's own: {told or 'none'}")


def _window(bench: Workbench) -> Window | Outcome:
    if not isinstance(bench.target.guest.feed, KdPump):
        return untried(_NO_DEBUGGER)
    return bench.target.log.window(None)
