"""``kdriver kd listen``, as a person or a program runs it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pytest

from pytest_kdriver.cli import main

PATIENCE = 30.0
SIMULATOR = Path(__file__).parents[1] / "kd" / "run.py"
LISTEN = "import sys; from pytest_kdriver.cli import main; sys.exit(main(['kd', 'listen', *sys.argv[1:]]))"
DRIVER = r"\SystemRoot\System32\drivers\hello.sys"
BASE = 0xFFFFF80300000000
LOAD = {"load": {"path": DRIVER, "base": BASE, "size": 0x5000}}


class Listener:
    """The command, in a process of its own. Its lines are taken as they come."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", LISTEN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.shown: list[str] = []
        self.said: list[str] = []
        self._changed = threading.Condition()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.shown)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.said)),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.end()

    def wait_for(self, pattern: str) -> str:
        """The first line that it shows, or says, in which ``pattern`` is found."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = [line for line in self.shown + self.said if re.search(pattern, line)]
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(is_there, PATIENCE), (self.shown, self.said)
        return found[0]

    def interrupt(self) -> int:
        """Ctrl-C, and the end; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> int:
        """Its exit code, and all that it wrote."""
        for thread in self._threads:
            thread.join(PATIENCE)
        return self.process.wait(PATIENCE)

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    lines.append(line.rstrip("\n"))
                    self._changed.notify_all()


class Kernel:
    """The simulated kernel, in a process of its own."""

    def __init__(self, *where: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SIMULATOR), *where], stdin=subprocess.PIPE, text=True
        )

    def do(self, *steps: dict[str, dict[str, Any]]) -> None:
        assert self._process.stdin is not None
        for step in steps:
            self._process.stdin.write(json.dumps(step) + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.kill()
        self._process.stdin.close()
        self._process.wait(PATIENCE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "com1"


@pytest.fixture
def kernels(path: Path) -> Iterator[Callable[..., Kernel]]:
    """Starts kernels at the path."""
    with ExitStack() as stack:

        def start(*where: str) -> Kernel:
            kernel = Kernel(*(where or ("--socket", str(path))))
            stack.callback(kernel.end)
            return kernel

        yield start


@contextmanager
def text_machine(path: Path) -> Iterator[socket.socket]:
    """A machine that is listened to, and writes text."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield server


class TestByKd:
    def test_each_print_is_shown_at_once_with_its_time(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do({"print": {"text": "hello\n"}})
            line = listener.wait_for("hello")
            assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}  hello", line)
            kernel.do({"print": {"text": "two\nlines \x1b[31m\n"}})
            listener.wait_for("  two$")
            listener.wait_for(r"  lines \\x1b\[31m$")

    def test_images_breakpoints_and_bug_checks_are_told_in_words(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do(
                LOAD,
                {"breakpoint": {"address": BASE + 0x1000}},
                {
                    "bug_check": {
                        "code": 0xD1,
                        "parameters": [0x10, 2, 0, BASE + 0x1234],
                        "blamed": "hello.sys",
                        "stack": [BASE + 0x1238],
                    }
                },
            )
            listener.wait_for("  hello: lies at 0xFFFFF80300000000")
            listener.wait_for(r"  hello: breakpoint \(int 3\) at address 0xFFFFF80300001000")
            listener.wait_for(r"  bug check 0xD1 DRIVER_IRQL_NOT_LESS_OR_EQUAL \(0x10, 0x2, 0x0, ")
            listener.wait_for(r"      hello\+0x1238$")
            # it is not held: it starts anew
            kernel.do({"print": {"text": "anew\n"}})
            listener.wait_for("  anew$")

    def test_json_has_an_object_for_each_event(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        before = time.time()
        with Listener(f"unix:{path}", "--wait", "--json") as listener:
            kernel.do(LOAD, {"print": {"text": "hello\n"}}, {"bug_check": {"code": 0xE2}})
            listener.wait_for('"BugCheck"')
            assert listener.interrupt() == 0
        told = [json.loads(line) for line in listener.shown]
        assert all(before <= event["time"] <= time.time() for event in told)
        image = next(event for event in told if event.get("driver") == "hello")
        assert image["event"] == "ImageLoaded"
        assert (image["path"], image["base"], image["size"]) == (DRIVER, f"0x{BASE:X}", 0x5000)
        said = next(event for event in told if event["event"] == "DebugPrint")
        assert said["text"] == "hello\n"
        crash = next(event for event in told if event["event"] == "BugCheck")
        assert crash["code"] == "0xE2"
        assert crash["name"] == "MANUALLY_INITIATED_CRASH"
        assert crash["parameters"] == ["0x0"] * 4

    def test_ctrl_c_ends_it_with_a_word_on_the_guest(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do({"print": {"text": "hello\n"}})
            listener.wait_for("hello")
            assert listener.interrupt() == 0
        assert any("the guest has no debugger now" in line for line in listener.said)
        assert any(re.search(r"answered within \d+ us on average", line) for line in listener.said)
        assert not any("Traceback" in line for line in listener.said)

    def test_a_machine_that_is_started_anew_is_met_again(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do({"print": {"text": "before\n"}})
            listener.wait_for("before")
            kernel.end()
            listener.wait_for("is gone; waiting for it")
            path.unlink()
            kernels().do({"print": {"text": "behind\n"}})
            listener.wait_for("behind")

    def test_one_that_was_running_is_met_too(
        self, path: Path, kernels: Callable[..., Kernel]
    ) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do({"print": {"text": "first\n"}})
            listener.wait_for("first")
            assert listener.interrupt() == 0
        with Listener(f"unix:{path}") as listener:
            kernel.do({"print": {"text": "second\n"}})
            listener.wait_for("second")

    def test_it_listens_at_a_tcp_port(self, kernels: Callable[..., Kernel]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            number = str(server.getsockname()[1])
        kernel = kernels("--tcp", number)
        with Listener(f"tcp:127.0.0.1:{number}", "--wait") as listener:
            kernel.do({"print": {"text": "hello\n"}})
            listener.wait_for("hello")

    def test_nothing_is_lost_of_a_flood(self, path: Path, kernels: Callable[..., Kernel]) -> None:
        kernel = kernels()
        with Listener(f"unix:{path}", "--wait") as listener:
            kernel.do({"count": {"text": "line {n}\n", "number": 2000}})
            listener.wait_for("line 1999$")
        lines = [line.rpartition("line ")[2] for line in listener.shown if "line " in line]
        assert lines == [str(number) for number in range(2000)]


class TestByText:
    def test_each_line_is_shown(self, path: Path) -> None:
        with text_machine(path) as server, Listener(f"unix:{path}", "--text") as listener:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello\r\n")
                listener.wait_for(r"^\d\d:\d\d:\d\d\.\d{3}  hello$")
                assert listener.interrupt() == 0
        assert any("what the guest writes from now on is lost" in line for line in listener.said)

    @pytest.mark.parametrize("more", [b"", b"more\n"], ids=["silence", "more"])
    def test_a_pipe_that_nobody_reads_any_more_ends_it_quietly(
        self, path: Path, more: bytes
    ) -> None:
        with text_machine(path) as server:
            command = [sys.executable, "-c", LISTEN, f"unix:{path}", "--text"]
            pipe = subprocess.PIPE
            with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
                connection, _ = server.accept()
                with connection:
                    assert process.stdout is not None
                    assert process.stderr is not None
                    connection.sendall(b"hello\n")
                    assert process.stdout.readline().endswith(b"hello\n")
                    process.stdout.close()
                    connection.sendall(more)
                    assert process.wait(PATIENCE) == 0
                    assert process.stderr.read() == b""


class TestWithoutAMachine:
    def test_it_ends_with_a_sentence(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["kd", "listen", f"unix:{path}"]) == 1
        assert capsys.readouterr().err.startswith(
            f"kdriver: nobody listens at unix:{path}: No such"
        )

    def test_an_address_that_is_none_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["kd", "listen", "/dev/ttyS0"]) == 2
        assert "write unix:PATH or tcp:HOST:PORT" in capsys.readouterr().err

    def test_it_waits_for_it_until_ctrl_c(self, path: Path) -> None:
        with Listener(f"unix:{path}", "--text", "--wait") as listener:
            with text_machine(path) as server:
                connection, _ = server.accept()
                connection.close()
            listener.wait_for("is gone; waiting for it")
            assert listener.interrupt() == 0

    def test_where_no_kernel_answers_it_says_what_may_be_the_matter(self, path: Path) -> None:
        with text_machine(path), Listener(f"unix:{path}") as listener:
            listener.wait_for("no kernel has answered yet: is debugging on in the guest")
            assert listener.interrupt() == 0
