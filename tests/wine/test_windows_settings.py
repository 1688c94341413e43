"""What a Windows for tests is set to, made and read back on Wine: what is in a registry, for Wine has one.

What bcdedit, netsh, winrm and their like do on a Windows, Wine's do not, or are not there: see
``tests/unit/test_windows_settings.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pytest_kdriver.errors import AgentError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.targets.windows.in_force import (
    CODE_INTEGRITY,
    KERNEL_DEBUGGER,
    CodeIntegrity,
    NotInForce,
    assert_in_force,
    decode_code_integrity,
    decode_flags,
    examine,
    secure_boot,
)
from pytest_kdriver.targets.windows.kinds import (
    BOOT_MANAGER,
    INTEGRITY,
    OBJECTS,
    PRINT_FILTER,
    Boot,
    Reading,
    Values,
)
from pytest_kdriver.targets.windows.listeners import LISTENER, Listeners, thumbprint
from pytest_kdriver.targets.windows.settings import (
    DEBUGGER,
    Wanted,
    make_settings,
    read_settings,
    settings,
)
from tests.unit.test_windows_settings import SYSTEM, new_pfx
from tests.wine.test_wine_agent import new_guest

WANTED = Wanted(agent_service="kdagent")
IN_THE_REGISTRY = [setting for setting in settings(WANTED) if isinstance(setting, Values)]
OF_THE_BOOT = [setting for setting in (*settings(WANTED), DEBUGGER) if isinstance(setting, Boot)]


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with new_guest() as guest, guest.agent() as agent:
        yield agent


def reading(agent: Agent, name: str, wanted: Wanted = WANTED) -> Reading:
    return next(reading for reading in read_settings_of_wine(agent, wanted) if reading.name == name)


def read_settings_of_wine(agent: Agent, wanted: Wanted) -> list[Reading]:
    return [
        setting.read(agent) for setting in settings(wanted) if isinstance(setting, Values | Boot)
    ]


@pytest.mark.parametrize("setting", IN_THE_REGISTRY, ids=lambda setting: setting.name)
class TestASettingInTheRegistry:
    def test_is_made_and_read_back(self, agent: Agent, setting: Values) -> None:
        for value in setting.values:  # what the fresh one has is otherwise
            if value.data is None:
                agent.set_value(value.key, value.name, "left")
            elif value.found(agent) is not None:
                agent.delete_value(value.key, value.name)
        assert not setting.read(agent).in_force
        setting.make(agent)
        made = setting.read(agent)
        assert made.in_force, made
        assert made.found == made.wanted
        setting.make(agent)  # a second time changes nothing
        assert setting.read(agent) == made

    def test_that_lacks_one_of_its_values_says_which(self, agent: Agent, setting: Values) -> None:
        setting.make(agent)
        value = setting.values[-1]
        agent.set_value(value.key, value.name, "otherwise")
        found = setting.read(agent)
        assert not found.in_force
        assert f"{value.name} otherwise" in found.found
        setting.make(agent)


@pytest.mark.parametrize("setting", OF_THE_BOOT, ids=lambda setting: setting.name)
def test_what_the_boot_configuration_has_is_read_from_the_registry(
    agent: Agent, setting: Boot
) -> None:
    r"""As it stands there on a Windows, by forensics.wiki's page on it: one byte, or eight."""
    agent.set_value(f"{OBJECTS}\\{BOOT_MANAGER}\\Elements\\23000003", "Element", SYSTEM)
    for element in setting.elements:
        of = SYSTEM if element.of == "{default}" else element.of
        length = 1 if element.type >> 24 & 0xF == 6 else 8
        key = f"{OBJECTS}\\{of}\\Elements\\{element.type:08x}"
        agent.set_value(key, "Element", (element.data ^ 1).to_bytes(length, "little"))
        assert not setting.read(agent).in_force
        agent.set_value(key, "Element", element.data.to_bytes(length, "little"))
    assert setting.read(agent).in_force
    agent.delete_key(OBJECTS)


def test_a_boot_configuration_without_a_system_that_starts_has_nothing(agent: Agent) -> None:
    agent.set_value(f"{OBJECTS}\\{BOOT_MANAGER}\\Elements\\23000003", "Element", "")
    assert reading(agent, "test signing").found == "testsigning absent"
    assert not reading(agent, "test signing").in_force
    assert not DEBUGGER.read(agent).in_force


def test_a_variant_with_memory_integrity_wants_it_on(agent: Agent) -> None:
    wanted = Wanted(agent_service="", hvci=True)
    setting = next(setting for setting in settings(wanted) if setting.name == "memory integrity")
    setting.make(agent)
    assert reading(agent, "memory integrity", wanted).in_force
    assert not reading(agent, "memory integrity").in_force


def test_the_listeners_are_read_where_the_service_keeps_them(agent: Agent) -> None:
    pfx = new_pfx()
    setting = Listeners(pfx)
    assert setting.read(agent).found == "HTTP absent, HTTPS absent, no certificate"
    agent.set_value(f"{LISTENER}\\*+HTTP", "Port", 5985)
    agent.set_value(f"{LISTENER}\\*+HTTPS", "Port", 5986)
    agent.set_value(f"{LISTENER}\\*+HTTPS", "certThumbprint", "00" * 20)
    assert not setting.read(agent).in_force
    agent.set_value(f"{LISTENER}\\*+HTTPS", "certThumbprint", thumbprint(pfx).lower())
    assert setting.read(agent).in_force
    assert Listeners(None).read(agent).in_force


def test_all_at_once_end_at_the_first_that_this_guest_can_t_be_set_to(agent: Agent) -> None:
    """Wine has no bcdedit, and a setting that could not be made is never passed over."""
    told: list[str] = []
    with pytest.raises(AgentError, match=r"bcdedit\.exe /set {default} testsigning on"):
        make_settings(agent, WANTED, told.append)
    assert told == ["test signing"]
    names = [reading.name for reading in read_settings_of_wine(agent, WANTED)]
    assert set(names) < {setting.name for setting in settings(WANTED)}


def test_what_can_t_be_read_is_an_error_and_no_reading(agent: Agent) -> None:
    """Wine's secedit writes nothing."""
    with pytest.raises(AgentError, match=r"policy\.inf"):
        read_settings(agent, WANTED)


class TestWhatIsInForce:
    """Wine's kernel answers two of the three questions, and not as a Windows for tests would."""

    def test_is_asked_of_the_kernel(self, agent: Agent) -> None:
        assert decode_code_integrity(agent.system_information(CODE_INTEGRITY)) is (
            CodeIntegrity.ENABLED
        )
        assert decode_flags(agent.system_information(KERNEL_DEBUGGER)) == (False, True)
        assert secure_boot(agent) is False  # by the registry: Wine's kernel does not know

    def test_is_read_from_the_registry_that_was_set(self, agent: Agent) -> None:
        for setting in IN_THE_REGISTRY:
            setting.make(agent)
        facts = {fact.name: fact for fact in examine(agent, kernel_log=True)}
        assert [name for name, fact in facts.items() if not fact.in_force] == ["test signing"]
        agent.delete_value(PRINT_FILTER, "DEFAULT")
        agent.set_value(INTEGRITY, "Enabled", 1)
        facts = {fact.name: fact for fact in examine(agent, kernel_log=True)}
        assert facts["debug print filter"].found == "DEFAULT absent"
        assert facts["memory integrity"].found == "set on, and does not run"

    def test_is_refused_by_name_where_it_is_not(self, agent: Agent) -> None:
        with pytest.raises(NotInForce, match=r"test signing: off \(code integrity 0x1\)"):
            assert_in_force(agent, kernel_log=False, target="wine")
