"""All kinds of links, without an agent: streams to ordinary programs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.process import ProcessLink
from pytest_kdriver.guest.links.serial import SerialLink
from pytest_kdriver.guest.links.ssh import SshLink
from pytest_kdriver.guest.links.winrm import WinrmLink
from tests.unit.far_ends import PortGuest, Sshd, command_line, python, until
from tests.unit.wsman_server import WsmanServer

ECHO = "import shutil; shutil.copyfileobj(open(0, 'rb', 0), open(1, 'wb', 0))"
DEAF = "import os, signal; signal.alarm(60); os.write(1, b'%d' % os.getpid()); signal.pause()"
MANY = b"0123456789abcde}" * (1 << 18)  # 4 MiB: far more than pipes hold, and some that is escaped
ALL_BYTES = bytes(range(256))

Open = Callable[[str], Link]


def child(script: str, *, close_timeout: float = 5) -> ProcessLink:
    return ProcessLink(python(script), close_timeout=close_timeout)


def receive_all(link: Link) -> bytes:
    return b"".join(iter(link.receive, b""))


def receive_until(link: Link, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := link.receive()):
        data += more
    return data


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with closing(Sshd(tmp_path_factory.mktemp("ssh") / "sshd")) as sshd:
        yield sshd


@pytest.fixture(scope="module")
def wsman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WsmanServer]:
    pytest.importorskip("winrm")
    with closing(WsmanServer(tmp_path_factory.mktemp("winrm") / "wsman")) as server:
        yield server


@pytest.fixture(params=["process", "serial", "ssh", "winrm"])
def open_link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open a link of each kind to a program that is written in Python; they are closed at the end."""
    with ExitStack() as last_to_first:

        def open_link(script: str) -> Link:
            link: Link
            if request.param == "process":
                link = child(script, close_timeout=0.5)
            elif request.param == "serial":
                path = tmp_path / f"port-{len(list(tmp_path.glob('port-*')))}"
                last_to_first.callback(PortGuest(path, script).close)
                link = SerialLink(path, timeout=10)
            elif request.param == "ssh":
                sshd: Sshd = request.getfixturevalue("sshd")
                link = SshLink(sshd.config(), command_line(script), timeout=20, close_timeout=0.5)
            else:
                wsman: WsmanServer = request.getfixturevalue("wsman")
                link = WinrmLink(
                    wsman.config(), command_line(script), timeout=20, close_timeout=0.5
                )
            last_to_first.callback(link.close)
            return link

        yield open_link


class TestEachKind:
    def test_passes_all_byte_values_both_ways(self, open_link: Open) -> None:
        link = open_link(ECHO)
        link.send(b"", 1)
        link.send(ALL_BYTES, 10)
        assert receive_until(link, 256) == ALL_BYTES
        assert link.ended is None

    def test_keeps_the_order_of_what_is_sent(self, open_link: Open) -> None:
        link = open_link(ECHO)
        sent = b"".join(b"%d~" % number for number in range(3000))
        for number in range(3000):
            link.send(b"%d~" % number, 10)
        assert receive_until(link, len(sent)) == sent

    def test_lets_both_sides_write_much_at_the_same_time(
        self, open_link: Open, pool: ThreadPoolExecutor
    ) -> None:
        write = f"sys.stdout.buffer.write(b'~' * {len(MANY)}); sys.stdout.flush()"
        link = open_link(f"import sys; {write}; {ECHO}")
        received = pool.submit(receive_until, link, 2 * len(MANY))
        link.send(MANY, 30)
        assert received.result(60) == b"~" * len(MANY) + MANY

    def test_does_not_mix_what_senders_send_at_the_same_time(
        self, open_link: Open, pool: ThreadPoolExecutor
    ) -> None:
        link = open_link(ECHO)
        received = pool.submit(receive_until, link, 4 * 300_000)
        list(pool.map(lambda byte: link.send(byte * 300_000, 30), [b"a", b"}", b"c", b"~"]))
        runs = received.result(30)
        borders = [i for i in range(1, len(runs)) if runs[i - 1] != runs[i]]
        assert borders == [300_000, 600_000, 900_000]

    def test_times_out_where_nobody_reads_and_leaves_nothing(
        self, open_link: Open, pool: ThreadPoolExecutor, tmp_path: Path
    ) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        link = open_link(f"print(flush=True); open({str(fifo)!r}).read(); {ECHO}")
        assert link.receive() == b"\n"
        link.send(MANY, 0.3)  # a part fits into what is between: the rest stays in front
        with pytest.raises(TimeoutError, match="did not read for"):
            link.send(b"never sent", 0.05)
        fifo.write_bytes(b"")
        received = pool.submit(receive_until, link, len(MANY) + 4)
        link.send(b"next", 30)
        assert received.result(60) == MANY + b"next"

    def test_ends_with_the_far_end(self, open_link: Open) -> None:
        link = open_link("print('last words')")
        assert receive_all(link) == b"last words\n"
        assert link.receive() == b""
        assert link.ended is not None
        with pytest.raises(LinkError, match="gone"):
            link.send(b"hello?", 10)

    def test_ends_when_the_far_end_closes_its_output(self, open_link: Open) -> None:
        link = open_link("import os; os.write(1, b'x'); os.close(1); os.close(2); os.read(0, 1)")
        if isinstance(link, WinrmLink):
            pytest.skip("a WinRM server tells the end of a command, not that of its output")
        assert receive_all(link) == b"x"
        assert link.receive() == b""

    def test_ends_when_the_far_end_is_killed(
        self, open_link: Open, pool: ThreadPoolExecutor
    ) -> None:
        link = open_link(DEAF)
        far_end = int(link.receive())
        waiting = pool.submit(link.receive)
        os.kill(far_end, signal.SIGKILL)
        assert waiting.result(10) == b""

    def test_wakes_who_waits_when_it_is_closed(
        self, open_link: Open, pool: ThreadPoolExecutor
    ) -> None:
        link = open_link(DEAF)
        assert link.receive()
        receiving = pool.submit(link.receive)
        sending = [pool.submit(link.send, MANY, 100) for _ in range(2)]
        link.close()
        assert receiving.result(10) == b""
        for future in sending:
            with pytest.raises(LinkError, match="closed"):
                future.result(10)

    def test_is_at_its_end_when_it_is_closed(self, open_link: Open) -> None:
        link = open_link(ECHO)
        link.close()
        link.close()
        assert link.receive() == b""
        with pytest.raises(LinkError, match="closed"):
            link.send(b"x", 1)

    def test_ends_the_far_end_s_input_when_it_is_closed(
        self, open_link: Open, tmp_path: Path
    ) -> None:
        done = tmp_path / "done"
        link = open_link(
            f"import sys; print(flush=True); sys.stdin.read(); open({str(done)!r}, 'x')"
        )
        assert link.receive() == b"\n"
        link.close()
        until(done.exists)

    def test_can_be_had_again(self, open_link: Open) -> None:
        for _ in range(3):
            link = open_link(ECHO)
            link.send(b"x", 10)
            assert link.receive() == b"x"
            link.close()

    def test_leaves_nothing_behind(self, open_link: Open) -> None:
        def descriptors() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        open_link(ECHO).close()  # what is imported and kept at the first time
        threads = set(threading.enumerate())
        before = descriptors()
        link = open_link(ECHO)
        during = descriptors() - before
        link.close()
        until(lambda: descriptors() <= before + min(during, 1))  # the port's own socket listens on
        assert [t for t in set(threading.enumerate()) - threads if "kdriver" in t.name] == []

    def test_may_have_descriptors_above_1024(self, open_link: Open) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            for _ in range(1100):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            link = open_link(ECHO)
            link.send(b"x", 10)
            assert link.receive() == b"x"
            link.close()


class TestProcessLink:
    def test_a_grandchild_that_keeps_the_output_open_does_not_hide_the_end(self) -> None:
        script = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True)"
        with closing(child(script)) as link:
            grandchild = int(receive_all(link))
            os.kill(grandchild, signal.SIGKILL)

    def test_close_ends_a_child_that_ends_with_its_input(self) -> None:
        link = child(ECHO)
        link.close()
        assert link.returncode == 0

    def test_close_kills_a_child_that_does_not_end(self) -> None:
        link = child(DEAF, close_timeout=0.1)
        assert link.receive()
        start = time.monotonic()
        link.close()
        assert link.returncode == -signal.SIGKILL
        assert time.monotonic() - start < 5

    def test_the_child_has_a_session_of_its_own(self) -> None:
        with closing(child("import os; print(os.getsid(0) == os.getpid())")) as link:
            assert receive_all(link) == b"True\n"

    def test_stderr_environment_and_folder_are_the_caller_s(self, tmp_path: Path) -> None:
        script = "import os, sys; print(os.environ['KD'], os.getcwd(), file=sys.stderr)"
        with (tmp_path / "stderr").open("wb") as stderr:
            link = ProcessLink(
                [sys.executable, "-c", script],
                env={"KD": "1"},
                stderr=stderr.fileno(),
                cwd=tmp_path,
            )
        assert receive_all(link) == b""
        link.close()
        assert (tmp_path / "stderr").read_text() == f"1 {tmp_path}\n"

    def test_stderr_can_be_dropped(self) -> None:
        script = "import sys; sys.exit('nobody reads this')"
        with closing(
            ProcessLink([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        ) as link:
            assert receive_all(link) == b""

    def test_a_program_that_is_not_there_is_a_link_error(self) -> None:
        with pytest.raises(LinkError, match=r"/nowhere/wine can't be started"):
            ProcessLink(["/nowhere/wine"])
