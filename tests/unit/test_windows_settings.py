"""What is asked of a Windows's programs, and what is made of their answers. Not verified on Windows."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import NoEncryption, pkcs12
from cryptography.x509.oid import NameOID

from pytest_kdriver.errors import AgentError, TargetError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.registry import encode_value
from pytest_kdriver.guest.wire import Message
from pytest_kdriver.targets.windows import kinds
from pytest_kdriver.targets.windows.listeners import (
    FirewallRule,
    Listeners,
    common_name,
    thumbprint,
)
from pytest_kdriver.targets.windows.settings import (
    PasswordAge,
    Wanted,
    make_settings,
    maximum_password_age,
    read_settings,
    settings,
    switch_debugger_on,
)
from pytest_kdriver.win32error import Win32Error
from tests.unit.test_agent import FakeGuest, connect

SYSTEM = "{5e7d4f1c-0d0c-11ee-8a52-525400123456}"
"""The object of the system that starts; each Windows has another."""

NETSH = """
Rule Name:                            kdriver-winrm
----------------------------------------------------------------------
Enabled:                              Yes
Direction:                            In
Profiles:                             Domain,Private,Public
Grouping:
LocalIP:                              Any
RemoteIP:                             Any
Protocol:                             TCP
LocalPort:                            5985,5986
RemotePort:                           Any
Edge traversal:                       No
Action:                               Allow
Ok.

"""
"""As a Windows shows a rule in the notes of dcos-diagnostics; two ports have a comma between in others."""

TEMPLATE = """[Unicode]
Unicode=yes
[System Access]
MinimumPasswordAge = 0
MaximumPasswordAge = {age}
MinimumPasswordLength = 0
[Version]
signature="$CHICAGO$"
Revision=1
"""
"""What ``secedit /export`` writes, by public scripts that take it from there: UTF-16 with a byte order mark.

-1 is "never", as in Microsoft's SecurityPolicyDsc.
"""


def new_pfx(host: str = "kdriver-win10") -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    named = [x509.NameAttribute(NameOID.COMMON_NAME, host)] if host else []
    name = x509.Name(named)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return pkcs12.serialize_key_and_certificates(b"winrm", key, certificate, None, NoEncryption())


class Windows(FakeGuest):
    """Its registry, its files, and what its programs do to them, as this project has it from documents.

    ``broken`` is a command that says no.
    """

    def __init__(self, *, broken: str = "") -> None:
        self.values: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.files: dict[str, bytes] = {}
        self.commands: list[str] = []
        self.lines: list[str] = []
        self.rules: list[str] = []
        self._broken = broken
        self._uploads: dict[int, str] = {}
        super().__init__(
            {
                messages.GetValue: self._get_value,
                messages.SetValue: self._set_value,
                messages.DeleteValue: self._delete_value,
                messages.PutBegin: self._put_begin,
                messages.PutData: self._put_data,
                messages.Get: self._get,
                messages.Delete: self._delete,
                messages.StartService: messages.Code(code=0),
                messages.Run: self._run,
            }
        )
        self.set(f"{kinds.OBJECTS}\\{kinds.BOOT_MANAGER}\\Elements\\23000003", "Element", SYSTEM)

    def set(self, key: str, name: str, value: int | str | bytes) -> None:
        self.values[key, name] = encode_value(value)

    def _get_value(self, request: Message) -> Message:
        assert isinstance(request, messages.GetValue)
        held = self.values.get((request.key, request.name))
        value = None if held is None else messages.Value(kind=held[0], data=held[1])
        return messages.OptionalValue(value=value)

    def _set_value(self, request: Message) -> Message:
        assert isinstance(request, messages.SetValue)
        self.values[request.key, request.name] = request.kind, request.data
        return messages.Done()

    def _delete_value(self, request: Message) -> Message:
        assert isinstance(request, messages.DeleteValue)
        del self.values[request.key, request.name]
        return messages.Done()

    def _put_begin(self, request: Message) -> Message:
        assert isinstance(request, messages.PutBegin)
        self._uploads[len(self._uploads) + 1] = request.path
        self.files[request.path] = b""
        return messages.Upload(upload=len(self._uploads))

    def _put_data(self, request: Message) -> Message:
        assert isinstance(request, messages.PutData)
        self.files[self._uploads[request.upload]] += request.data
        return messages.Done()

    def _get(self, request: Message) -> Message:
        assert isinstance(request, messages.Get)
        data = self.files[request.path]
        return messages.File(data=data, sha256=hashlib.sha256(data).digest())

    def _delete(self, request: Message) -> Message:
        assert isinstance(request, messages.Delete)
        del self.files[request.path]
        return messages.Done()

    def _run(self, request: Message) -> Message:
        assert isinstance(request, messages.Run)
        command = request.command_line
        self.commands.append(command)
        if self._broken and command.startswith(self._broken):
            return ended(1, stderr="Das System kann die angegebene Datei nicht finden.")
        if command.startswith("cmd.exe /c "):
            self.lines = self.files[command.removeprefix("cmd.exe /c ")].decode().splitlines()
            for line in self.lines:
                self._line(line)
            return ended(0)
        return self._program(command)

    def _line(self, line: str) -> None:
        """A line of a batch file."""
        made = re.match(
            r"call winrm create winrm/config/Listener\?Address=\*\+Transport=(\w+)", line
        )
        if made:
            key = f"{LISTENER}\\*+{made[1]}"
            self.set(key, "Port", {"HTTP": 5985, "HTTPS": 5986}[made[1]])
            if by := re.search(r'CertificateThumbprint="(\w+)"', line):
                self.set(key, "certThumbprint", by[1])

    def _program(self, command: str) -> Message:
        match command.split():
            case ["bcdedit.exe", "/set", "{default}", option, told]:
                element, data = ELEMENTS[option, told]
                self.set(f"{kinds.OBJECTS}\\{SYSTEM}\\Elements\\{element}", "Element", data)
            case ["bcdedit.exe", "/dbgsettings", "serial", "debugport:1", "baudrate:115200"]:
                for element, number in (("15000011", 0), ("15000013", 1), ("15000014", 115200)):
                    key = f"{kinds.OBJECTS}\\{kinds.DEBUGGER_SETTINGS}\\Elements\\{element}"
                    self.set(key, "Element", number.to_bytes(8, "little"))
            case ["powercfg.exe", "/hibernate", "off"]:
                self.set(r"SYSTEM\CurrentControlSet\Control\Power", "HibernateEnabled", 0)
            case ["netsh.exe", "advfirewall", "firewall", verb, "rule", "name=kdriver-winrm", *_]:
                return self._netsh(verb)
            case ["net.exe", "accounts", "/maxpwage:unlimited"] | ["certutil.exe", *_]:
                pass
            case ["secedit.exe", "/export", "/areas", "SECURITYPOLICY", "/cfg", path, "/quiet"]:
                self.files[path] = TEMPLATE.format(age=-1).encode("utf-16")
            case _:
                raise AssertionError(command)
        return ended(0)

    def _netsh(self, verb: str) -> Message:
        if verb == "add":
            self.rules.append(NETSH)
        elif not self.rules:
            return ended(1, stdout="\r\nNo rules match the specified criteria.\r\n\r\n")
        elif verb == "delete":
            self.rules.clear()
        else:
            return ended(0, stdout="".join(self.rules))
        return ended(0)


LISTENER = r"SOFTWARE\Microsoft\Windows\CurrentVersion\WSMAN\Listener"
ELEMENTS = {
    ("testsigning", "on"): ("16000049", b"\1"),
    ("hypervisorlaunchtype", "off"): ("250000f0", bytes(8)),
    ("hypervisorlaunchtype", "auto"): ("250000f0", b"\1" + bytes(7)),
    ("debug", "on"): ("260000a0", b"\1"),
    ("recoveryenabled", "no"): ("16000009", b"\0"),
    ("bootstatuspolicy", "ignoreallfailures"): ("250000e0", b"\1" + bytes(7)),
}
"""bcdedit's options, and the elements by Microsoft's BcdLibraryElementTypes and BcdOSLoaderElementTypes."""


def ended(code: int, *, stdout: str = "", stderr: str = "") -> messages.Completed:
    return messages.Completed(
        exit_code=code,
        stdout=stdout.encode(),
        stderr=stderr.encode(),
        timed_out=False,
        truncated=False,
    )


def quiet(_: str) -> None:
    pass


class TestAllSettings:
    @pytest.mark.parametrize("hvci", [False, True])
    def test_are_made_and_read_back(self, hvci: bool) -> None:
        wanted = Wanted(agent_service="kdagent", hvci=hvci, certificate=new_pfx())
        told: list[str] = []
        with connect(Windows()) as agent:
            before = [reading.in_force for reading in read_settings(agent, wanted)]
            make_settings(agent, wanted, told.append)
            readings = read_settings(agent, wanted)
        assert all(reading.in_force for reading in readings), readings
        assert told == [reading.name for reading in readings]
        assert before.count(True) <= 4  # what is off where nobody said so

    def test_leave_the_debugger_for_the_end(self) -> None:
        windows = Windows()
        with connect(windows) as agent:
            make_settings(agent, Wanted(agent_service=""), quiet)
            assert "bcdedit.exe /set {default} debug on" not in windows.commands
            switch_debugger_on(agent)
        assert windows.commands[-1] == "bcdedit.exe /set {default} debug on"

    def test_have_names_of_their_own(self) -> None:
        names = [setting.name for setting in settings(Wanted(agent_service="kdagent"))]
        assert len(names) == len(set(names))

    def test_that_read_otherwise_than_they_were_set_are_told(self) -> None:
        windows = Windows()
        windows.answers[messages.SetValue] = messages.Done()  # and nothing is there
        with (
            connect(windows) as agent,
            pytest.raises(TargetError, match="memory integrity was set to .* and reads .*absent"),
        ):
            make_settings(agent, Wanted(agent_service=""), quiet)

    def test_leave_no_file_behind(self) -> None:
        windows = Windows()
        with connect(windows) as agent:
            make_settings(agent, Wanted(agent_service="", certificate=new_pfx()), quiet)
        assert windows.files == {}

    def test_show_no_key_of_the_certificate(self) -> None:
        wanted = Wanted(agent_service="", certificate=b"secret")
        assert "secret" not in repr((wanted, settings(wanted)))


class TestPrograms:
    @pytest.mark.parametrize(
        "broken", ["bcdedit.exe /set", "bcdedit.exe /dbgsettings", "certutil.exe", "net.exe"]
    )
    def test_that_say_no_are_told_with_what_they_said(self, broken: str) -> None:
        windows = Windows(broken=broken)
        wanted = Wanted(agent_service="", certificate=new_pfx())
        with connect(windows) as agent, pytest.raises(AgentError) as caught:
            make_settings(agent, wanted, quiet)
        assert str(caught.value).startswith(f"run: {broken}")
        assert "ended with 1: Das System kann" in str(caught.value)
        assert windows.files == {}  # above all no key

    def test_are_asked_for_what_the_documents_have(self) -> None:
        windows = Windows()
        with connect(windows) as agent:
            make_settings(agent, Wanted(agent_service="", certificate=new_pfx()), quiet)
        for command in (
            "bcdedit.exe /set {default} testsigning on",
            "bcdedit.exe /dbgsettings serial debugport:1 baudrate:115200",
            'certutil.exe -f -p "" -importpfx C:\\kdriver\\winrm.pfx',
            "netsh.exe advfirewall firewall add rule name=kdriver-winrm dir=in action=allow "
            "protocol=TCP localport=5985,5986 profile=any",
            "net.exe accounts /maxpwage:unlimited",
        ):
            assert command in windows.commands


class TestTheListeners:
    def test_are_those_of_http_alone_without_a_certificate(self) -> None:
        windows = Windows()
        with connect(windows) as agent:
            Listeners(None).make(agent)
            assert Listeners(None).read(agent).in_force
            assert not Listeners(new_pfx()).read(agent).in_force
        assert not [command for command in windows.commands if "certutil" in command]

    def test_need_a_service_that_starts(self) -> None:
        windows = Windows()
        windows.answers[messages.StartService] = messages.Code(
            code=Win32Error.ERROR_SERVICE_DISABLED
        )
        with connect(windows) as agent, pytest.raises(AgentError, match="WinRM does not start"):
            Listeners(None).make(agent)

    def test_are_made_by_the_certificate_s_host_and_thumbprint(self) -> None:
        windows, pfx = Windows(), new_pfx()
        with connect(windows) as agent:
            Listeners(pfx).make(agent)
        assert windows.lines[-1] == (
            "call winrm create winrm/config/Listener?Address=*+Transport=HTTPS "
            f'@{{Hostname="kdriver-win10";CertificateThumbprint="{thumbprint(pfx)}"}} || exit /b 1'
        )

    @pytest.mark.parametrize("name", ["two words", 'a";evil', ""])
    def test_of_a_certificate_that_is_no_host_s_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="no host"):
            common_name(new_pfx(name))

    def test_are_known_by_the_sha_1_of_their_certificate(self) -> None:
        pfx = new_pfx()
        held = pkcs12.load_pkcs12(pfx, None).cert
        assert held is not None
        assert bytes.fromhex(thumbprint(pfx)) == held.certificate.fingerprint(hashes.SHA1())


class TestTheFirewallRule:
    def test_is_one_however_often_it_is_made(self) -> None:
        windows = Windows()
        with connect(windows) as agent:
            assert FirewallRule().read(agent).found == "no such rule"
            FirewallRule().make(agent)
            FirewallRule().make(agent)
            assert FirewallRule().read(agent).in_force
        assert len(windows.rules) == 1

    def test_without_one_of_the_ports_is_not_in_force(self) -> None:
        windows = Windows()
        windows.rules.append(NETSH.replace(",5986", ""))
        with connect(windows) as agent:
            reading = FirewallRule().read(agent)
        assert (reading.in_force, reading.found) == (False, "TCP 5985")


class TestThePasswordAge:
    @pytest.mark.parametrize(("age", "in_force"), [(-1, True), (42, False)])
    def test_is_read_from_the_security_template(self, age: int, in_force: bool) -> None:
        assert maximum_password_age(TEMPLATE.format(age=age).encode("utf-16")) == age
        windows = Windows()
        windows.answers[messages.Run] = written(windows, age)
        with connect(windows) as agent:
            assert PasswordAge().read(agent).in_force is in_force

    @pytest.mark.parametrize("template", [b"", b"\xff\xfe", b"\xff\xfeM\0a", b"nothing"])
    def test_that_is_not_in_it_is_not_in_force(self, template: bytes) -> None:
        assert maximum_password_age(template) is None


def written(windows: Windows, age: int) -> Callable[[Message], Message]:
    def run(request: Message) -> Message:
        windows.files[r"C:\kdriver\policy.inf"] = TEMPLATE.format(age=age).encode("utf-16")
        return ended(0)

    return run
