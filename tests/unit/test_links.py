"""Links, without an agent: streams to ordinary children."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pytest_kdriver.errors import LinkError
from pytest_kdriver.guest.links.link import Link
from pytest_kdriver.guest.links.process import ProcessLink

ECHO = "import shutil; shutil.copyfileobj(open(0, 'rb', 0), open(1, 'wb', 0))"
DEAF = "import signal; print(flush=True); signal.pause()"
MANY = b"0123456789abcdef" * (1 << 18)  # 4 MiB: far more than pipes hold


def child(script: str, *, close_timeout: float = 5) -> ProcessLink:
    return ProcessLink([sys.executable, "-c", script], close_timeout=close_timeout)


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


def test_a_process_link_is_a_link() -> None:
    with closing(child(ECHO)) as link:
        as_link: Link = link
        as_link.send(b"", 1)


def test_all_byte_values_pass_both_ways() -> None:
    with closing(child(ECHO)) as link:
        link.send(bytes(range(256)), 10)
        assert receive_until(link, 256) == bytes(range(256))


def test_both_sides_may_write_much_at_the_same_time(pool: ThreadPoolExecutor) -> None:
    write = f"sys.stdout.buffer.write(b'x' * {len(MANY)}); sys.stdout.flush()"
    with closing(child(f"import sys; {write}; {ECHO}")) as link:
        received = pool.submit(receive_until, link, 2 * len(MANY))
        link.send(MANY, 30)
        assert received.result(30) == b"x" * len(MANY) + MANY


def test_what_senders_send_at_the_same_time_is_not_mixed(pool: ThreadPoolExecutor) -> None:
    with closing(child(ECHO)) as link:
        received = pool.submit(receive_until, link, 4 * 300_000)
        list(pool.map(lambda byte: link.send(byte * 300_000, 30), [b"a", b"b", b"c", b"d"]))
        runs = received.result(30)
        borders = [i for i in range(1, len(runs)) if runs[i - 1] != runs[i]]
        assert borders == [300_000, 600_000, 900_000]


def test_a_send_that_nobody_reads_times_out_and_leaves_nothing() -> None:
    wait = "signal.pthread_sigmask(0, [signal.SIGUSR1]); print(flush=True); signal.sigwait([10])"
    with closing(child(f"import signal; {wait}; {ECHO}")) as link:
        assert link.receive() == b"\n"
        link.send(MANY, 0.05)  # a part fits into the pipe: the rest stays in front
        with pytest.raises(TimeoutError, match="did not read for"):
            link.send(b"never sent", 0.05)
        os.kill(link.pid, signal.SIGUSR1)
        received: list[bytes] = []
        reader = threading.Thread(
            target=lambda: received.append(receive_until(link, len(MANY) + 4))
        )
        reader.start()
        link.send(b"next", 30)
        reader.join()
        assert received == [MANY + b"next"]


def test_the_end_of_the_child_is_the_end_of_the_stream() -> None:
    with closing(child("print('last words')")) as link:
        assert receive_all(link) == b"last words\n"
        assert link.receive() == b""
        with pytest.raises(LinkError, match="gone"):
            link.send(b"hello?", 10)


def test_a_grandchild_that_keeps_the_output_open_does_not_hide_the_end() -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '100']).pid, flush=True)"
    with closing(child(script)) as link:
        grandchild = int(receive_all(link))
        os.kill(grandchild, signal.SIGKILL)


def test_a_killed_child_is_the_end_too() -> None:
    with closing(child(DEAF)) as link:
        assert link.receive() == b"\n"
        os.kill(link.pid, signal.SIGKILL)
        assert link.receive() == b""


def test_close_wakes_who_waits(pool: ThreadPoolExecutor) -> None:
    link = child(DEAF, close_timeout=0.1)
    assert link.receive() == b"\n"
    receiving = pool.submit(link.receive)
    sending = pool.submit(link.send, MANY, 100)
    link.close()
    assert receiving.result(10) == b""
    with pytest.raises(LinkError, match="closed"):
        sending.result(10)


def test_a_closed_link_is_at_its_end() -> None:
    link = child(ECHO)
    link.close()
    link.close()
    assert link.receive() == b""
    with pytest.raises(LinkError, match="closed"):
        link.send(b"x", 1)


def test_close_ends_a_child_that_ends_with_its_input() -> None:
    link = child(ECHO)
    link.close()
    assert link.returncode == 0


def test_close_kills_a_child_that_does_not_end() -> None:
    link = child(DEAF, close_timeout=0.1)
    assert link.receive() == b"\n"
    start = time.monotonic()
    link.close()
    assert link.returncode == -signal.SIGKILL
    assert time.monotonic() - start < 5


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    pids = []
    for _ in range(10):
        with closing(child(ECHO)) as link:
            pids.append(link.pid)
    assert descriptors() == before
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_descriptors_may_be_above_1024() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        link = child(ECHO)
        link.send(b"x", 10)
        assert link.receive() == b"x"
        link.close()
    assert link.returncode == 0


def test_the_child_has_a_session_of_its_own() -> None:
    with closing(child("import os; print(os.getsid(0) == os.getpid())")) as link:
        assert receive_all(link) == b"True\n"


def test_stderr_environment_and_folder_are_the_caller_s(tmp_path: Path) -> None:
    script = "import os, sys; print(os.environ['KD'], os.getcwd(), file=sys.stderr)"
    with (tmp_path / "stderr").open("wb") as stderr:
        link = ProcessLink(
            [sys.executable, "-c", script], env={"KD": "1"}, stderr=stderr.fileno(), cwd=tmp_path
        )
    assert receive_all(link) == b""
    link.close()
    assert (tmp_path / "stderr").read_text() == f"1 {tmp_path}\n"


def test_stderr_can_be_dropped() -> None:
    script = "import sys; sys.exit('nobody reads this')"
    with closing(ProcessLink([sys.executable, "-c", script], stderr=subprocess.DEVNULL)) as link:
        assert receive_all(link) == b""


def test_a_program_that_is_not_there_is_a_link_error() -> None:
    with pytest.raises(LinkError, match=r"/nowhere/wine can't be started"):
        ProcessLink(["/nowhere/wine"])
