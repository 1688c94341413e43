"""Guests of the project's own image, under a libvirt that is the measurement's alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import libvirt
import libvirt_qemu

from bench.guest import ROOT
from pytest_kdriver.config import TargetConfig
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets.disk_images import Phase, ensure
from pytest_kdriver.targets.libvirt.machine import LibvirtMachine
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.recipe import find_recipe
from pytest_kdriver.targets.runs import Run, remove_tree
from tests.vm.daemon import PrivateLibvirt, daemon_user

IMAGE = "winevm"
ANSWER_TIMEOUT = 30.0
_JOB_INTERVAL = 0.001


@contextmanager
def own_libvirt() -> Iterator[str]:
    """The URI of a libvirt that ends with its guests; the environment's cache is one that these can enter."""
    daemon = PrivateLibvirt()
    try:
        daemon.start()
        with _own_cache() as cache, mock.patch.dict(os.environ, KDRIVER_CACHE=str(cache)):
            yield daemon.uri
    finally:
        daemon.stop()


@contextmanager
def _own_cache() -> Iterator[Path]:
    """What takes long to make is the real cache's, or, for what guests read, their user's."""
    real = cache_directory()
    home = real if os.geteuid() else Path(daemon_user().pw_dir)
    own = home / f"bench-{os.getpid()}"
    own.mkdir(parents=True)
    try:
        kept = dict.fromkeys(("wine", "programs", "hosts"), real)
        kept |= dict.fromkeys(("disks", "booted"), home)
        for name, folder in kept.items():
            (folder / name).mkdir(exist_ok=True, parents=True)
            (own / name).symlink_to(folder / name)
        _share_image(own / "disks")
        yield own
    finally:
        remove_tree(own)


def _share_image(disks: Path) -> None:
    """Make the image, if it has to be, and have it in ``disks`` too, by hard links if possible."""
    recipe = find_recipe(IMAGE, ROOT)
    assert recipe is not None
    run = Run()
    try:
        image = ensure(recipe, run, _tell)
    finally:
        run.close()
    shared = disks / image.folder.name
    if not shared.exists():
        unfinished = shared.with_name(f".{shared.name}-{os.getpid()}")
        shutil.copytree(image.folder, unfinished, copy_function=_link)
        unfinished.rename(shared)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copy2(source, destination)


def _tell(phase: Phase) -> None:
    print(f"{phase.elapsed:4.0f} s: {phase.name}", file=sys.stderr, flush=True)


@contextmanager
def winevm_target(uri: str, **settings: object) -> Iterator[MachineTarget]:
    """A started target with one virtual CPU, whose agent is at its serial port."""
    vm = {"image": IMAGE, "uri": uri, "cpus": 1, **settings}
    config = TargetConfig(name=IMAGE, kind="libvirt", vm=vm)
    target = MachineTarget(config.name, LibvirtMachine(config))
    try:
        target.start()
        yield target
    finally:
        target.close()


class BareGuest:
    """The only guest that runs under a libvirt, used without this project's code: what the floors are of."""

    def __init__(self, uri: str) -> None:
        self._connection = libvirt.open(uri)
        (self._domain,) = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        inserted = [block.get("inserted") for block in self._monitor("query-block")]
        self._nodes = [i["node-name"] for i in inserted if i and not i["ro"]]

    def close(self) -> None:
        self._connection.close()

    def load_snapshot(self, tag: str) -> float:
        """QMP's ``snapshot-load``, and nothing else; the seconds until it is over."""
        begin = time.perf_counter()
        self._monitor(
            "snapshot-load",
            **{"job-id": "bench", "tag": tag, "vmstate": self._nodes[0], "devices": self._nodes},
        )
        while (job := self._monitor("query-jobs")[0])["status"] != "concluded":
            time.sleep(_JOB_INTERVAL)
        seconds = time.perf_counter() - begin
        self._monitor("job-dismiss", id="bench")
        assert "error" not in job, job
        return seconds

    def take_snapshot(self, name: str) -> None:
        """One of libvirt's own, of memory and disk, inside the disk's image."""
        self._domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>")

    def revert_to_snapshot(self, name: str) -> float:
        """Revert as libvirt does; the seconds until the agent has answered."""
        snapshot = self._domain.snapshotLookupByName(name)
        begin = time.perf_counter()
        self._domain.revertToSnapshot(snapshot)
        link = SerialLink(self.port("kdriver.agent"), timeout=ANSWER_TIMEOUT)
        with Agent.connect(link, timeout=ANSWER_TIMEOUT):
            return time.perf_counter() - begin

    def port(self, name: str) -> Path:
        """The socket of one of its virtio-serial ports."""
        domain = ET.fromstring(self._domain.XMLDesc())
        source = domain.find(f"devices/channel/target[@name='{name}']/../source")
        assert source is not None, name
        return Path(source.attrib["path"])

    @contextmanager
    def plugged_port(self, name: str, path: Path) -> Iterator[None]:
        """Give it one more virtio-serial port for a while, with a socket at ``path``."""
        channel = ET.Element("channel", type="unix")
        ET.SubElement(channel, "source", mode="bind", path=str(path))
        ET.SubElement(channel, "target", type="virtio", name=name)
        xml = ET.tostring(channel, encoding="unicode")
        self._domain.attachDevice(xml)
        yield
        self._domain.detachDevice(xml)

    def _monitor(self, command: str, **arguments: object) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments})
        reply = json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, request, 0))
        assert "error" not in reply, reply
        return reply["return"]
