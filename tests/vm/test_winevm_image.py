"""What is in winevm's disk, without libvirt: QEMU alone boots it, once for all of these tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import pytest

from pytest_kdriver.config import load_config
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.guest.links.ssh import SshConfig, SshLink
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.kernel.events import DebugPrint, DriverInit, Fence
from pytest_kdriver.kernel.log import KernelLog
from pytest_kdriver.kernel.sources.wine import WineTrace
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.disk_images import DiskImage, Phase, ensure
from pytest_kdriver.targets.port_pump import PortPump
from pytest_kdriver.targets.recipe import read_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.vm_config import VmConfig, vm_config
from pytest_kdriver.win32error import Win32Error

ROOT: Final = Path(__file__).parents[2]
BOOT_TIMEOUT: Final = 180.0
TIMEOUT: Final = 60.0
PARAMETERS: Final = r"SYSTEM\CurrentControlSet\Services\chatty\Parameters"


class RawGuest:
    """The disk's machine, by QEMU as it is, in ``folder``."""

    def __init__(self, image: DiskImage, folder: Path) -> None:
        self.folder = folder
        self.config: VmConfig = vm_config(image.target)
        assert self.config.kernel is not None
        disk = folder / "overlay.qcow2"
        create = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2")
        subprocess.run([*create, "-b", image.disk, disk], check=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.ssh_port = int(free.getsockname()[1])
        forward = f"hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22"
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # it is under no libvirt that is looked after
                *("qemu-system-x86_64", "-nodefaults", "-display", "none"),
                *("-accel", "tcg", "-cpu", "max,smap=off", "-smp", "1"),
                *("-m", str(self.config.memory), "-append", self.config.cmdline),
                *("-kernel", str(self.config.kernel), "-initrd", str(self.config.initrd)),
                *("-drive", f"file={disk},if=virtio,format=qcow2,cache=unsafe"),
                *("-device", "virtio-serial-pci", "-serial", f"file:{self.console}"),
                *self._port("agent"),
                *self._port("trace"),
                *("-netdev", f"user,id=net,restrict=on,{forward}"),
                *("-device", "virtio-net-pci,netdev=net,romfile="),
                *("-qmp", f"unix:{folder / 'monitor'},server=on,wait=off"),
            ],
            stdin=subprocess.DEVNULL,
        )
        with self._connect("monitor") as connection:
            self._monitor = connection.makefile("rw")
        self._monitor.readline()
        self._ask({"execute": "qmp_capabilities"})

    @property
    def console(self) -> Path:
        return self.folder / "console"

    def port(self, name: str) -> Path:
        return self.folder / name

    def _port(self, name: str) -> list[str]:
        chardev = f"socket,id={name},path={self.port(name)},server=on,wait=off"
        return [
            *("-chardev", chardev),
            *("-device", f"virtserialport,chardev={name},name=kdriver.{name}"),
        ]

    def _connect(self, name: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        while connection.connect_ex(str(self.port(name))):
            assert self.process.poll() is None, "QEMU ended"
            time.sleep(0.01)
        return connection

    def _ask(self, request: object) -> str:
        self._monitor.write(f"{json.dumps(request)}\n")
        self._monitor.flush()
        while True:
            answer = json.loads(self._monitor.readline())
            if "event" not in answer:
                return cast("str", answer["return"])

    def monitor(self, command: str) -> None:
        """A command of QEMU's human monitor, which says nothing if all went well."""
        arguments = {"command-line": command}
        assert self._ask({"execute": "human-monitor-command", "arguments": arguments}) == ""

    def agent(self) -> Agent:
        link = SerialLink(self.port("agent"), timeout=BOOT_TIMEOUT)
        return Agent.connect(link, timeout=TIMEOUT)

    def ssh(self, command: str) -> SshLink:
        config = SshConfig(
            host="127.0.0.1",
            port=self.ssh_port,
            user=self.config.ssh_user,
            key=self.config.ssh_key,
            known_hosts=self.config.ssh_known_hosts,
            host_key_alias="kdriver-winevm",
            agent=False,
        )
        return SshLink(config, command, timeout=TIMEOUT)

    def shell(self, command: str) -> str:
        """What a shell in the guest prints."""
        link = self.ssh(command)
        said = b""
        try:
            while piece := link.receive():
                said += piece
        finally:
            link.close()
        return said.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._monitor.close()


@pytest.fixture(scope="module")
def guest(winevm_image: DiskImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawGuest]:
    folder = tmp_path_factory.mktemp("raw")
    guest = RawGuest(winevm_image, folder)
    yield guest
    guest.close()
    shutil.rmtree(folder)


class Trace:
    """The trace's port and what it says."""

    def __init__(self, guest: RawGuest) -> None:
        self.log = KernelLog()
        self.pump = PortPump(guest.port("trace"), WineTrace, self.log, "raw")
        self.pump.begin(BOOT_TIMEOUT)

    def until(self, agent: Agent, cookie: str) -> None:
        """Wait for all that was said before now."""
        position = len(self.log)
        agent.fence(cookie)
        window = self.log.window(None, position)
        assert window.wait_for(
            lambda _, event: isinstance(event, Fence) and event.cookie == cookie, TIMEOUT
        )

    def prints(self, driver: str, start: int) -> list[bytes]:
        return [said.raw for said in self.log.window(driver, start).of(DebugPrint)]


@pytest.fixture(scope="module")
def trace(guest: RawGuest) -> Iterator[Trace]:
    trace = Trace(guest)
    yield trace
    trace.pump.close()


@pytest.fixture(scope="module")
def agent(guest: RawGuest, trace: Trace) -> Iterator[Agent]:
    config = load_config(ROOT)
    assert config.manifest is not None
    cargo = Cargo(config.manifest, profile=config.profile)
    agent = guest.agent()
    for name in ("hello", "chatty"):
        agent.put(cargo.build(name), f"C:\\{name}.sys")
        agent.create_service(name, f"C:\\{name}.sys")
    yield agent
    agent.close()


def cycle(agent: Agent, driver: str) -> None:
    assert agent.start_service(driver) == Win32Error.ERROR_SUCCESS
    assert agent.stop_service(driver) == Win32Error.ERROR_SUCCESS


def assert_hello_is_heard(agent: Agent, trace: Trace) -> None:
    start = len(trace.log)
    cycle(agent, "hello")
    trace.until(agent, f"hello-{start}")
    statuses = [event.status for event in trace.log.window("hello", start).of(DriverInit)]
    assert statuses == [NTSTATUS.STATUS_SUCCESS]
    assert trace.prints("hello", start) == [b"Hello, world!\n", b"Bye bye!\n"]


def test_a_driver_s_prints_come_by_the_trace_s_port(agent: Agent, trace: Trace) -> None:
    assert_hello_is_heard(agent, trace)


def test_no_message_of_a_flood_is_lost(agent: Agent, trace: Trace) -> None:
    start = len(trace.log)
    agent.set_value(PARAMETERS, "Lines", 50_000)
    cycle(agent, "chatty")
    trace.until(agent, "flooded")
    numbers = [int(text.split()[0]) for text in trace.prints("chatty", start)]
    assert numbers == list(range(1, 50_001))


def test_over_ssh_it_is_the_same_prefix_and_the_same_trace(
    guest: RawGuest, agent: Agent, trace: Trace
) -> None:
    agent.put(b"seen", r"C:\seen")
    other = Agent.connect(guest.ssh(guest.config.ssh_command), timeout=TIMEOUT)
    try:
        assert other.get(r"C:\seen") == b"seen"
        assert_hello_is_heard(other, trace)
    finally:
        other.close()


def test_a_snapshot_brings_all_of_it_back(guest: RawGuest, agent: Agent, trace: Trace) -> None:
    trace.until(agent, "drained")
    guest.monitor("savevm first")
    agent.set_value(PARAMETERS, "Lines", 10_000_000)
    for attempt in range(3):
        agent.put(b"canary", r"C:\canary")
        start = len(trace.log)
        agent.submit_start("chatty")  # it prints, while
        assert trace.log.window("chatty", start).wait_for(
            lambda _, event: isinstance(event, DebugPrint), TIMEOUT
        )
        guest.monitor("loadvm first")
        agent.resume(timeout=TIMEOUT)
        trace.pump.begin(TIMEOUT)
        start = len(trace.log)
        assert agent.hash(r"C:\canary") is None, attempt
        assert_hello_is_heard(agent, trace)
        assert trace.prints("chatty", start) == []


def test_the_trace_goes_on_when_the_host_comes_back(
    guest: RawGuest, agent: Agent, trace: Trace
) -> None:
    trace.pump.close()
    agent.set_value(PARAMETERS, "Lines", 50_000)
    cycle(agent, "chatty")  # more than is kept for a host that may never come back
    again = Trace(guest)
    trace.log, trace.pump = again.log, again.pump
    assert_hello_is_heard(agent, trace)


def test_tests_have_room_and_the_right_to_set_the_clock(agent: Agent) -> None:
    assert agent.free_space("C:\\") > 800 << 20
    now = time.time()
    agent.set_clock(now + 86_400)
    assert abs(agent.clock() - time.time() - 86_400) < 5
    agent.set_clock(time.time())


def test_nobody_can_log_in_at_the_console(guest: RawGuest) -> None:
    assert "login:" not in guest.console.read_text(errors="replace")
    assert guest.shell("getent shadow root").split(":")[1] == "*"


def test_how_the_host_reaches_its_mirrors_is_not_told_to_the_guest(guest: RawGuest) -> None:
    """Addresses and proxies may have passwords in them."""
    assert guest.shell("grep -rlE '://|Acquire::' /etc/apt; echo searched") == "searched\n"


def test_what_is_killed_is_there_again(guest: RawGuest, agent: Agent, trace: Trace) -> None:
    for program in ("kdagent.exe", "kdtrace"):
        guest.shell(
            f"old=$(pidof kdagent.exe); kill -KILL $(pidof {program}); "
            "while new=$(pidof kdagent.exe); [ -z $new ] || [ $new = $old ]; do sleep 0.1; done"
        )
        agent.close()
        trace.pump.close()
        agent, trace = guest.agent(), Trace(guest)
        try:
            if agent.query_service("hello") is None:  # Wine had not written it to its disk yet
                agent.create_service("hello", r"C:\hello.sys")
            assert_hello_is_heard(agent, trace)
        finally:
            agent.close()
            trace.pump.close()


def test_an_interrupted_build_takes_all_its_processes_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine"
    recipe.mkdir()
    (recipe / "recipe.toml").write_text("as_root = true\n")
    (recipe / "build").write_text(
        "#!/bin/sh\n"
        "setsid sleep 600 &\n"
        'mkdir "$1/root"; chown 7:7 "$1/root"; chmod 700 "$1/root"; touch "$1/root/file"\n'
        "readlink /proc/self/ns/pid > pids\n"
        "echo begun\nwait\n"
    )
    (recipe / "build").chmod(0o755)

    def interrupt(phase: Phase) -> None:
        raise KeyboardInterrupt

    run = Run()
    try:
        with pytest.raises(KeyboardInterrupt):
            ensure(read_recipe(recipe), run, interrupt)
        assert not list(run.path.glob("disk-*"))
    finally:
        run.close()
    namespace = (recipe / "pids").read_text().strip()
    assert namespace not in {_namespace(entry) for entry in os.scandir("/proc")}


def _namespace(process: os.DirEntry[str]) -> str:
    try:
        return str(Path(process.path, "ns/pid").readlink())
    except OSError:
        return ""
