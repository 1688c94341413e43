"""What has to be in force in a Windows before a test begins. The Windows is a fake: not verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.config import TargetConfig
from pytest_kdriver.errors import AgentError
from pytest_kdriver.guest import messages
from pytest_kdriver.remote_config import RemoteConfig
from pytest_kdriver.targets import remote as remote_module
from pytest_kdriver.targets.machine_target import MachineTarget
from pytest_kdriver.targets.remote import RemoteMachine
from pytest_kdriver.targets.windows.exact_status import SERVICE
from pytest_kdriver.targets.windows.in_force import (
    CodeIntegrity,
    Fact,
    NotInForce,
    assert_in_force,
    decode_code_integrity,
    decode_flags,
    examine,
)
from pytest_kdriver.targets.windows.kinds import (
    BOOT_MANAGER,
    INTEGRITY,
    OBJECTS,
    PRINT_FILTER,
)
from tests.unit.test_agent import connect
from tests.unit.test_remote import CONTROL, FakeProgram, FakeWay, Windows
from tests.unit.test_windows_settings import SYSTEM

Change = Callable[[Windows], object]


def code_integrity(options: int) -> bytes:
    return (8).to_bytes(4, "little") + options.to_bytes(4, "little")


def options(number: int) -> Change:
    return lambda windows: windows.information.update({103: code_integrity(number)})


def value(key: str, name: str, data: int | str | bytes | None) -> Change:
    def change(windows: Windows) -> None:
        windows.values.pop((key, name), None)
        if data is not None:
            windows.values[key, name] = data

    return change


def attribute(name: str, held: float) -> Change:
    return lambda windows: setattr(windows, name, held)


def facts(*changes: Change, kernel_log: bool = False) -> dict[str, Fact]:
    windows = Windows()
    for change in changes:
        change(windows)
    with connect(windows) as agent:
        return {fact.name: fact for fact in examine(agent, kernel_log=kernel_log)}


NO_SIGNING = options(0x1)


def secure_boot(windows: Windows) -> None:
    windows.information |= {103: code_integrity(1), 145: b"\1\1"}


class TestAWindowsForTests:
    def test_has_all_in_force(self) -> None:
        assert [name for name, fact in facts(kernel_log=True).items() if not fact.in_force] == []

    @pytest.mark.parametrize(
        ("change", "name", "found"),
        [
            (NO_SIGNING, "test signing", "off (code integrity 0x1)"),
            (attribute("free", 63 << 20), "free disk", "63 MiB of C: are free"),
            (
                value(INTEGRITY, "Enabled", 1),
                "memory integrity",
                "set on, and does not run",
            ),
        ],
    )
    def test_that_lacks_what_tests_need_is_refused_with_what_mends_it(
        self, change: Change, name: str, found: str
    ) -> None:
        fact = facts(change)[name]
        assert (fact.found, fact.in_force, fact.needed) == (found, False, True)
        windows = Windows()
        change(windows)
        with connect(windows) as agent, pytest.raises(NotInForce) as caught:
            assert_in_force(agent, kernel_log=False, target="lab")
        assert str(caught.value).startswith("target 'lab': this is not in force in its Windows: ")
        assert f"{name}: {found}. {fact.mends}" in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "name", "found"),
        [
            (options(0x403), "memory integrity", "set off, and runs"),
            (
                value(f"{CONTROL}\\CrashControl", "AutoReboot", 0),
                "crash dumps",
                "CrashDumpEnabled is 3, AutoReboot 0",
            ),
            (
                value(f"{CONTROL}\\CrashControl", "CrashDumpEnabled", None),
                "crash dumps",
                "CrashDumpEnabled is absent, AutoReboot 1",
            ),
            (attribute("clock_off", 7200.0), "clock", "off by 7200 s"),
            (value(PRINT_FILTER, "DEFAULT", None), "debug print filter", "DEFAULT absent"),
            (
                lambda windows: windows.information.update({35: b"\1\0"}),
                "signatures beside a debugger",
                "a debugger is attached, DebugFlags absent",
            ),
        ],
    )
    def test_that_lacks_what_no_test_suffers_from_says_so_and_goes_on(
        self, change: Change, name: str, found: str
    ) -> None:
        windows = Windows()
        change(windows)
        with connect(windows) as agent:
            (fact,) = assert_in_force(agent, kernel_log=False, target="lab")
        assert (fact.name, fact.found) == (name, found)
        assert fact.mends

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ([options(0)], "test signing"),  # nobody looks at signatures at all
            ([options(0x403), value(INTEGRITY, "Enabled", 1)], "memory integrity"),
            (
                [
                    lambda windows: windows.information.update({35: b"\1\0"}),
                    value(f"{CONTROL}\\CI", "DebugFlags", 0x10),
                ],
                "signatures beside a debugger",
            ),
            ([lambda windows: windows.information.update({35: b"\1\1"})], "signatures beside a"),
            ([value(PRINT_FILTER, "DEFAULT", 0xF)], "debug print filter"),
        ],
    )
    def test_may_have_it_otherwise(self, changes: list[Change], name: str) -> None:
        found = facts(*changes, kernel_log=True)
        assert next(fact for told, fact in found.items() if told.startswith(name)).in_force

    @pytest.mark.parametrize("mask", [None, 0x1, 0x7, "f"])
    def test_whose_prints_nobody_sees_is_refused_where_tests_look_at_them(
        self, mask: int | str | None
    ) -> None:
        windows = Windows()
        value(PRINT_FILTER, "DEFAULT", mask)(windows)
        with connect(windows) as agent, pytest.raises(NotInForce, match="DbgPrint prints nothing"):
            assert_in_force(agent, kernel_log=True, target="lab")

    def test_that_lacks_several_things_names_all(self) -> None:
        windows = Windows()
        NO_SIGNING(windows)
        windows.free = 0
        with connect(windows) as agent, pytest.raises(NotInForce, match=r"test signing.*free disk"):
            assert_in_force(agent, kernel_log=False, target="lab")


class TestTestSigning:
    @pytest.mark.parametrize(
        ("changes", "mends"),
        [
            ([NO_SIGNING], "As administrator: bcdedit /set testsigning on, and restart"),
            (
                [
                    NO_SIGNING,
                    value(f"{OBJECTS}\\{BOOT_MANAGER}\\Elements\\23000003", "Element", SYSTEM),
                    value(f"{OBJECTS}\\{SYSTEM}\\Elements\\16000049", "Element", b"\1"),
                ],
                "It is switched on for the next start: restart it",
            ),
            ([secure_boot], "Secure Boot is on, which keeps it off"),
            (
                [
                    NO_SIGNING,
                    lambda windows: windows.information.pop(145),
                    value(f"{CONTROL}\\SecureBoot\\State", "UEFISecureBootEnabled", 1),
                ],
                "Secure Boot is on, which keeps it off",
            ),
        ],
    )
    def test_that_is_off_is_mended_by_what_keeps_it_off(
        self, changes: list[Change], mends: str
    ) -> None:
        assert facts(*changes)["test signing"].mends.startswith(mends)


class TestWhatAWindowsDoesNotTell:
    @pytest.mark.parametrize("data", [None, b"", b"\1\0\0\0"])
    def test_stops_nobody(self, data: bytes | None) -> None:
        windows = Windows()
        windows.information.clear()
        if data is not None:
            windows.information[103] = data
        with connect(windows) as agent:
            told = assert_in_force(agent, kernel_log=False, target="lab")
        names = ["test signing", "memory integrity", "signatures beside a debugger"]
        assert [fact.name for fact in told] == names
        assert all(fact.found.startswith("can't be told (") for fact in told)


class TestTheCodecs:
    def test_know_what_public_sources_have(self) -> None:
        """The bits of Microsoft's table of SYSTEM_CODEINTEGRITY_INFORMATION."""
        told = decode_code_integrity(bytes.fromhex("08000000 03240000"))
        assert told & 0x403 == (
            CodeIntegrity.ENABLED | CodeIntegrity.TESTSIGN | CodeIntegrity.HVCI_KMCI_ENABLED
        )
        assert decode_flags(b"\0\1") == (False, True)

    @given(st.binary(max_size=16))
    def test_take_any_bytes(self, data: bytes) -> None:
        if len(data) == 8:
            assert decode_code_integrity(data) == int.from_bytes(data[4:], "little")
        else:
            with pytest.raises(AgentError, match="no code integrity information"):
                decode_code_integrity(data)
        if len(data) < 2:
            with pytest.raises(AgentError, match="not 2 flags"):
                decode_flags(data)
        else:
            assert len(decode_flags(data)) == 2


Start = Callable[..., AbstractContextManager[MachineTarget]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(remote_module, "AGENT", FakeProgram(tmp_path / "kdagent.exe"))

    @contextmanager
    def start(*windows: Windows) -> Iterator[MachineTarget]:
        remote = RemoteConfig(host="lab", user="tester", timeout=5)
        config = TargetConfig(name="lab", kind="remote", remote=remote)
        target = MachineTarget("lab", RemoteMachine(config, way=FakeWay(*windows)))
        try:
            target.start()
            yield target
        finally:
            target.close()

    return start


class TestATarget:
    def test_that_is_not_as_tests_need_it_is_not_tried_again(self, start: Start) -> None:
        first, second = Windows(), Windows()
        NO_SIGNING(first)
        with pytest.raises(NotInForce, match="test signing"), start(first, second):
            pass
        assert second.requests == []

    def test_is_asked_once_whether_it_gives_an_exact_status(self, start: Start) -> None:
        windows, second = Windows(), Windows()
        with start(windows, second) as target:
            assert windows.asked(messages.LoadDriver) == [messages.LoadDriver(name=SERVICE)]
            assert windows.services == {}
            windows.close()
            target.repair()
            assert second.asked(messages.LoadDriver) == []
        assert second.files == {}

    @pytest.mark.parametrize(
        ("status", "told"),
        [
            (0xC0000365, "tells that a DriverEntry failed, and not by which status"),
            (0xC0000428, "takes no driver with a test signature: is test signing on"),
            (0xC0000001, "no test can tell what its driver answered"),
            (0, "no test can tell what its driver answered"),
        ],
    )
    def test_that_gives_another_is_refused(self, start: Start, status: int, told: str) -> None:
        first, second = Windows(), Windows()
        first.proof = status
        with (
            pytest.raises(NotInForce, match=rf"returns .*0xC0DE1234.* back as .*{told}"),
            start(first, second),
        ):
            pass
        assert second.requests == []

    def test_where_nothing_can_be_signed_is_not_asked(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        windows = Windows()
        with start(windows) as target:
            assert "exact status (not tried: there is no osslsigncode" in target.describe()
        assert windows.asked(messages.LoadDriver) == []

    def test_tells_once_what_is_not_in_force_and_no_test_suffers_from(
        self, start: Start, capfd: pytest.CaptureFixture[str]
    ) -> None:
        windows, second = Windows(), Windows()
        for one in (windows, second):
            value(f"{CONTROL}\\CrashControl", "AutoReboot", 0)(one)
        with start(windows, second) as target:
            assert target.describe() == (
                "Windows 10.0.19045 on lab by a fake; not in force there: "
                "crash dumps (CrashDumpEnabled is 3, AutoReboot 0)"
            )
            windows.close()
            target.repair()
        told = capfd.readouterr().err
        assert told.startswith("kdriver: target lab: not in force there: crash dumps, CrashDump")
        assert told.count("crash dumps") == 1
