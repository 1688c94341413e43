"""What is an SSH link's alone: who is there, who we are, and what is told when it does not work out."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import paramiko
import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.ssh import SshConfig, SshLink
from tests.unit.far_ends import Sshd, command_line

ROOT = Path(__file__).parents[2]
ECHO = "cat"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with closing(Sshd(tmp_path_factory.mktemp("ssh") / "sshd")) as sshd:
        yield sshd


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def works(config: SshConfig) -> bool:
    with closing(SshLink(config, ECHO, timeout=20)) as link:
        link.send(b"x", 10)
        return link.receive() == b"x"


def refused(config: SshConfig, *, command: str = ECHO) -> str:
    """What is told where there is no link."""
    with pytest.raises(LinkError) as caught:
        SshLink(config, command, timeout=20)
    return str(caught.value)


class TestTheServer:
    def test_is_known_by_its_key(self, sshd: Sshd) -> None:
        assert works(sshd.config())

    def test_may_be_known_by_another_name(self, sshd: Sshd, tmp_path: Path) -> None:
        """As that of a guest is, whose port of this host is another each time."""
        kind, key = sshd.host_key.with_suffix(".pub").read_text().split()[:2]
        (tmp_path / "known").write_text(f"winevm {kind} {key}\n")
        config = sshd.config(known_hosts=tmp_path / "known", host_key_alias="winevm")
        assert works(config)
        told = refused(sshd.config(known_hosts=tmp_path / "known", host_key_alias="other"))
        assert told.startswith("other shows the host key ssh-ed25519 SHA256:")

    def test_may_be_known_by_a_hash(self, sshd: Sshd, tmp_path: Path) -> None:
        known = tmp_path / "known"
        known.write_bytes(sshd.known_hosts.read_bytes())
        subprocess.run(["ssh-keygen", "-H", "-f", known], check=True, capture_output=True)
        assert b"127.0.0.1" not in known.read_bytes()
        assert works(sshd.config(known_hosts=known))

    @pytest.mark.parametrize("content", [None, "", "example.org ssh-ed25519 AAAA\n"])
    def test_that_is_unknown_is_told_with_what_to_add(
        self, sshd: Sshd, tmp_path: Path, content: str | None
    ) -> None:
        known = tmp_path / "known"
        if content:
            other = sshd.new_key(f"other-{tmp_path.name}").with_suffix(".pub").read_text().split()
            content = f"example.org {other[0]} {other[1]}\n"
        if content is not None:
            known.write_text(content)
        config = sshd.config(known_hosts=known)
        told = refused(config)
        assert f"{known} knows none of this host" in told
        line = told.rpartition("add this line there: ")[2]
        with known.open("a") as file:
            file.write(f"{line}\n")
        assert works(config)

    def test_whose_key_is_another_is_told_with_what_to_remove(
        self, sshd: Sshd, tmp_path: Path
    ) -> None:
        old = sshd.new_key(f"old-{tmp_path.name}").with_suffix(".pub").read_text().split()
        known = tmp_path / "known"
        known.write_text(f"[127.0.0.1]:{sshd.port} {old[0]} {old[1]}\n")
        told = refused(sshd.config(known_hosts=known))
        shown = subprocess.run(
            ["ssh-keygen", "-l", "-f", sshd.host_key], capture_output=True, text=True, check=True
        ).stdout.split()[1]
        assert f"shows the host key ssh-ed25519 {shown}" in told
        assert "this is another machine, or it was made anew" in told
        command = told.rpartition("remove the old key: ")[2]
        subprocess.run(command, shell=True, check=True, capture_output=True)
        assert "knows none of this host" in refused(sshd.config(known_hosts=known))

    def test_that_does_not_listen_is_told(self, sshd: Sshd) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            told = refused(sshd.config(port=port))
        assert f"127.0.0.1:{port} did not take the connection" in told
        assert "refused" in told

    def test_that_is_none_is_told(self, sshd: Sshd, pool: ThreadPoolExecutor) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            waiting = pool.submit(refused, sshd.config(port=server.getsockname()[1]))
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert "did not say who it is" in waiting.result(20)

    def test_that_is_silent_is_a_timeout(self, sshd: Sshd) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            start = time.monotonic()
            with pytest.raises(TimeoutError, match=r"did not say who it is within 0\.3 s"):
                SshLink(sshd.config(port=server.getsockname()[1]), ECHO, timeout=0.3)
            assert time.monotonic() - start < 5

    def test_that_stops_in_the_middle_is_a_timeout(
        self, sshd: Sshd, pool: ThreadPoolExecutor
    ) -> None:
        """Wherever that is: a relay lets a part of what the server says through, and holds the rest."""
        for size in (0, 100, 1500):
            with socket.create_server(("127.0.0.1", 0)) as relay:
                pool.submit(_relay, relay, sshd.port, size)
                config = sshd.config(
                    port=relay.getsockname()[1], host_key_alias=f"[127.0.0.1]:{sshd.port}"
                )
                start = time.monotonic()
                with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
                    SshLink(config, ECHO, timeout=0.5)
                assert time.monotonic() - start < 5


def _relay(server: socket.socket, port: int, size: int) -> None:
    host, _ = server.accept()
    with host, socket.create_connection(("127.0.0.1", port)) as sshd:

        def send_down() -> None:
            left = size
            with contextlib.suppress(OSError):
                while left and (data := sshd.recv(left)):
                    host.sendall(data)
                    left -= len(data)

        downwards = threading.Thread(target=send_down)
        downwards.start()
        with contextlib.suppress(OSError):
            while data := host.recv(1 << 16):
                sshd.sendall(data)
            sshd.shutdown(socket.SHUT_RDWR)
        downwards.join()


class TestTheUser:
    def test_is_let_in_by_ssh_agent(
        self, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "agent"
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                assert agent.poll() is None
            monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
            config = sshd.config(key=None, agent=True)
            assert "tried: nothing" in refused(config)
            subprocess.run(["ssh-add", "-q", sshd.key], check=True)
            assert works(config)
            assert "tried: nothing" in refused(sshd.config(key=None, agent=False))
        finally:
            agent.terminate()
            agent.wait()

    def test_with_another_key_is_told(self, sshd: Sshd, tmp_path: Path) -> None:
        key = sshd.new_key(f"another-{tmp_path.name}")
        told = refused(sshd.config(key=key))
        assert re.search(rf"did not let the user \S+ in; tried: the key {key}\.", told)

    def test_may_have_a_key_with_a_passphrase(self, sshd: Sshd, tmp_path: Path) -> None:
        key = sshd.new_key(f"locked-{tmp_path.name}", "open sesame")
        with (sshd.folder / "authorized_keys").open("a") as file:
            file.write(key.with_suffix(".pub").read_text())
        assert works(sshd.config(key=key, password="open sesame"))
        assert "needs a passphrase: give it to ssh-agent" in refused(sshd.config(key=key))
        assert "can't be read" in refused(sshd.config(key=key, password="wrong"))

    def test_without_the_key_s_file_is_told(self, sshd: Sshd, tmp_path: Path) -> None:
        told = refused(sshd.config(key=tmp_path / "nowhere"))
        assert "nowhere can't be read" in told
        assert "No such file" in told

    def test_with_a_key_s_file_that_is_none_is_told(self, sshd: Sshd, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("not a key")
        assert "key can't be read" in refused(sshd.config(key=tmp_path / "key"))

    def test_has_a_password_that_is_shown_nowhere(self, sshd: Sshd) -> None:
        assert "secret" not in repr(sshd.config(password="secret"))


class PasswordServer(paramiko.ServerInterface):  # type: ignore[misc]  # its types are not known
    """A server that takes a password: a real one that does needs to be root, and the passwords of users."""

    def check_auth_password(self, username: str, password: str) -> int:
        good = (username, password) == ("tester", "secret")
        return int(paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.OPEN_SUCCEEDED)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if command == b"greet":
            threading.Thread(target=channel.sendall, args=(b"hello, tester",)).start()
        return command == b"greet"


@pytest.fixture
def password_server(sshd: Sshd) -> Iterator[SshConfig]:
    """The server's address, and the user's; the password is still to be given."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transports = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    transport = paramiko.Transport(connection)
                    transports.append(transport)
                    transport.add_server_key(paramiko.PKey.from_path(sshd.host_key))
                    with contextlib.suppress(paramiko.SSHException, EOFError):
                        transport.start_server(server=PasswordServer())

        thread = threading.Thread(target=serve)
        thread.start()
        yield sshd.config(
            port=listener.getsockname()[1],
            user="tester",
            key=None,
            host_key_alias=f"[127.0.0.1]:{sshd.port}",
        )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for transport in transports:
            transport.close()
            transport.join()


def with_password(config: SshConfig, password: str | None, key: Path | None = None) -> SshConfig:
    return SshConfig(
        host=config.host,
        port=config.port,
        user=config.user,
        key=key,
        password=password,
        known_hosts=config.known_hosts,
        agent=False,
        host_key_alias=config.host_key_alias,
    )


class TestThePassword:
    def test_lets_in(self, password_server: SshConfig) -> None:
        config = with_password(password_server, "secret")
        with closing(SshLink(config, "greet", timeout=20, close_timeout=0.1)) as link:
            assert link.receive() == b"hello, tester"

    def test_is_tried_behind_the_key(self, sshd: Sshd, password_server: SshConfig) -> None:
        config = with_password(password_server, "secret", sshd.key)
        with closing(SshLink(config, "greet", timeout=20, close_timeout=0.1)) as link:
            assert link.receive() == b"hello, tester"

    def test_that_is_wrong_is_told_and_not_repeated(self, password_server: SshConfig) -> None:
        told = refused(with_password(password_server, "guess"))
        assert "did not let the user tester in; tried: the password." in told
        assert "guess" not in told

    def test_that_is_missing_is_told(self, password_server: SshConfig) -> None:
        told = refused(with_password(password_server, None))
        assert "tried: nothing (no key, ssh-agent or password is there)" in told

    def test_lets_in_but_not_every_command_runs(self, password_server: SshConfig) -> None:
        told = refused(with_password(password_server, "secret"), command="rm -r")
        assert "did not start the agent" in told


class TestTheEnd:
    def test_of_a_command_that_is_not_there_says_so(self, sshd: Sshd) -> None:
        with closing(SshLink(sshd.config(), "no-such-agent", timeout=20)) as link:
            assert link.receive() == b""
            assert link.ended is not None
            assert link.ended.startswith("it ended with exit code 127 and said: ")
            assert "no-such-agent" in link.ended
            with pytest.raises(LinkError, match="the agent is gone: it ended with exit code 127"):
                link.send(b"x", 1)

    def test_is_told_at_once_when_the_server_is_killed(
        self, sshd: Sshd, tmp_path: Path, pool: ThreadPoolExecutor
    ) -> None:
        with closing(Sshd(tmp_path / "sshd")) as other:
            link = SshLink(other.config(), ECHO, timeout=20)
            waiting = pool.submit(link.receive)
            link.send(b"x", 10)
            assert waiting.result(10) == b"x"
            waiting = pool.submit(link.receive)
            other.kill()
            assert waiting.result(10) == b""
            assert link.ended is not None
            assert "the connection was lost" in link.ended
            with pytest.raises(LinkError, match="the connection was lost"):
                link.send(b"x", 1)
            link.close()

    def test_does_not_wait_for_what_the_agent_left_behind(self, sshd: Sshd) -> None:
        """As Wine's services, which keep the output open."""
        script = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True)"
        with closing(SshLink(sshd.config(), command_line(script), timeout=20)) as link:
            received = b"".join(iter(link.receive, b""))
            assert link.ended == "it ended with exit code 0"
        os.kill(int(received), signal.SIGKILL)

    def test_is_not_that_of_much_complaining(self, sshd: Sshd) -> None:
        script = "import sys; sys.stderr.write('x' * (8 << 20)); print('and now')"
        with closing(SshLink(sshd.config(), command_line(script), timeout=20)) as link:
            assert link.receive() == b"and now\n"

    def test_is_where_the_other_machine_no_longer_confirms(self, tmp_path: Path) -> None:
        """In a network of its own, which then goes down."""
        script = tmp_path / "script.py"
        script.write_text(_DEAD_PEER)
        alone = ["unshare", "--net"]
        if os.getuid():
            alone += ["--user", "--map-current-user", "--keep-caps"]
        tried = subprocess.run([*alone, "true"], capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"a network of its own can't be had here: {tried.stderr.strip()}")
        command = [*alone, sys.executable, str(script), str(tmp_path / "sshd")]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seconds, why = done.stdout.split(maxsplit=1)
        assert 1 < float(seconds) < 20
        assert why.startswith("the connection was lost")


_DEAD_PEER = """
import fcntl, socket, struct, sys, time
from pathlib import Path
from pytest_kdriver.guest.links import ssh
from tests.unit.far_ends import Sshd

def set_loopback(flags):
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", flags))  # SIOCSIFFLAGS

set_loopback(1)
ssh.KEEPALIVE, ssh.PEER_TIMEOUT = 0.5, 2.0
server = Sshd(Path(sys.argv[1]))
link = ssh.SshLink(server.config(), "cat", timeout=20)
link.send(b"x", 5)
assert link.receive() == b"x"
set_loopback(0)
start = time.monotonic()
assert link.receive() == b""
print(time.monotonic() - start, link.ended)
link.close()
server.close()
"""


def test_without_paramiko_it_is_told_what_to_install(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "paramiko"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "paramiko", None)
    assert "pip install 'pytest-kdriver[ssh]'" in refused(sshd.config())


def test_the_module_is_imported_without_paramiko() -> None:
    script = "import pytest_kdriver.guest.links.ssh, sys; sys.exit('paramiko' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
