"""A remote machine, as a user meets it: behind a real SSH server, with a Wine prefix for its Windows."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pytest_kdriver.guest.executable import AGENT
from pytest_kdriver.targets import prefix
from pytest_kdriver.targets.runs import Run as RunFolder
from tests.unit.far_ends import Sshd, until
from tests.wine.conftest import MANIFEST

Run = Callable[..., pytest.RunResult]
Verdicts = Callable[[pytest.RunResult], dict[str, str]]

HELLO = """
import pytest
from pytest_kdriver import NTSTATUS

@pytest.mark.kdriver("hello", leaks="allow")
def test_hello(kdriver):
    assert kdriver.start() == NTSTATUS.STATUS_SUCCESS
    assert kdriver.loaded
    assert kdriver.start(check=False) == NTSTATUS.STATUS_IMAGE_ALREADY_LOADED
    kdriver.stop()
    assert kdriver.service_state.name == "STOPPED"
"""


class Machine:
    """A prefix, and the folder that the agent is put into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "agent"
        self.prefix = folder / "prefix"
        run = RunFolder()
        source = prefix.template(prefix.find_wine(), run)
        run.close()
        prefix.clone(source, self.prefix)

    def close(self) -> None:
        prefix.remove(self.prefix)

    @property
    def command(self) -> str:
        """What a server's shell runs to start the agent."""
        wine = prefix.find_wine()
        environment = wine.environment(self.prefix, "-all")
        own = [f"{name}={value}" for name, value in environment.items() if name.startswith("WINE")]
        return shlex.join(["exec", "env", *own, wine.loader]) + " {agent}"

    def agents(self) -> list[Path]:
        return sorted(self.folder.glob("kdagent*"))

    def settings(self) -> dict[str, object]:
        """What a config says of it."""
        return {
            "kind": "remote",
            "host": "127.0.0.1",
            "agent_path": str(self.folder / "kdagent.exe"),
            "timeout": 60,
        }

    def agent_processes(self) -> list[int]:
        """The pids of the agents that run in the prefix."""
        found = []
        for pid in prefix.processes(self.prefix):
            with suppress(OSError):
                if b"kdagent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def images(self) -> list[Path]:
        return sorted((self.prefix / "drive_c" / "kdriver").rglob("*.sys"))


class Lab(Machine):
    """The machine behind its SSH server."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sshd = Sshd(folder / "sshd")

    def close(self) -> None:
        self.sshd.close()
        super().close()

    def settings(self) -> dict[str, object]:
        return super().settings() | {
            "port": self.sshd.port,
            "user": self.sshd.config().user,
            "ssh_key": str(self.sshd.key),
            "ssh_known_hosts": str(self.sshd.known_hosts),
            "ssh_command": self.command,
        }


@pytest.fixture
def lab(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with closing(Lab(tmp_path_factory.mktemp("lab"))) as lab:
        yield lab


def choose(project: pytest.Pytester, lab: Machine, **changes: object) -> None:
    """Make it the project's target."""
    lines = []
    for key, value in (lab.settings() | changes).items():
        shown = json.dumps(value) if isinstance(value, int | float) else f"'''{value}'''"
        lines.append(f"{key} = {shown}\n")
    path = project.path / "kdriver.toml"
    path.write_text(f'manifest = "{MANIFEST}"\nvm = "lab"\n\n[targets.lab]\n' + "".join(lines))


def begin(project: pytest.Pytester, file: str) -> subprocess.Popen[bytes]:
    """Start a run, and go on. What it says goes into ``file``'s log."""
    with (project.path / f"{file}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", file],
            cwd=project.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


class TestARun:
    def test_brings_the_agent_tests_a_driver_and_leaves_nothing_but_the_agent(
        self,
        project: pytest.Pytester,
        run: Run,
        verdicts: Verdicts,
        lab: Lab,
        left_behind: Callable[[], list[str]],
    ) -> None:
        choose(project, lab)
        project.makepyfile(HELLO)
        result = run("--kdriver-vm", "lab")
        assert verdicts(result) == {"test_hello[lab]": "PASSED"}
        result.stdout.fnmatch_lines([f"kdriver: lab (127.0.0.1:{lab.sshd.port} by SSH)*"])
        (agent,) = lab.agents()
        assert re.fullmatch(r"kdagent-[0-9a-f]{16}\.exe", agent.name)
        assert agent.read_bytes() == AGENT.executable().read_bytes()
        assert lab.images() == []
        until(lambda: not lab.agent_processes())
        assert left_behind() == []

    def test_behind_another_copies_nothing(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(HELLO)
        run()
        (agent,) = lab.agents()
        before = agent.stat()
        assert verdicts(run()) == {"test_hello[lab]": "PASSED"}
        after = agent.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert lab.agents() == [agent]

    def test_replaces_an_agent_that_is_another_under_its_name(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(HELLO)
        run()
        (agent,) = lab.agents()
        agent.write_bytes(b"cut off")
        assert verdicts(run()) == {"test_hello[lab]": "PASSED"}
        assert lab.agents() == [agent]
        assert agent.read_bytes() == AGENT.executable().read_bytes()

    def test_skips_what_needs_a_kernel_log_and_judges_no_leaks(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(
            """
            import pytest

            @pytest.mark.kdriver("hello", requires=["kernel-log"], leaks="allow")
            def test_needs_the_log(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("hello")
            def test_leaks(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("hello", leaks="allow")
            @pytest.mark.kdriver_isolation("test")
            def test_isolation(kdriver):
                kdriver.start()
            """
        )
        result = run("-rs")
        assert verdicts(result) == {
            "test_needs_the_log[lab]": "SKIPPED",
            "test_leaks[lab]": "FAILED",
            "test_isolation[lab]": "SKIPPED",
        }
        result.stdout.fnmatch_lines(["*whether it leaks can't be seen on target 'lab'*"])
        result.stdout.fnmatch_lines(["*target 'lab' has no capability 'snapshots'*"])

    def test_goes_on_behind_a_connection_that_was_lost_in_the_middle_of_a_test(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(
            test_cut=f"""
            import subprocess
            import pytest

            @pytest.mark.kdriver("hello", leaks="allow")
            def test_is_cut_off(kdriver):
                kdriver.start()
                subprocess.run(["pkill", "-KILL", "-P", "{lab.sshd.pid}"], check=True)
                kdriver.stop()
            """,
            test_next=HELLO,
        )
        result = run()
        assert verdicts(result) == {"test_is_cut_off[lab]": "FAILED", "test_hello[lab]": "PASSED"}
        result.stdout.re_match_lines(
            [r".*target 'lab': .*(link to the agent|agent is gone|connection was lost).*"]
        )
        assert lab.images() == []

    def test_whose_last_test_lost_the_connection_cleans_up_by_another(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(
            test_cut=f"""
            import subprocess
            import pytest

            @pytest.mark.kdriver("hello", leaks="allow")
            def test_is_cut_off(kdriver):
                kdriver.start()
                subprocess.run(["pkill", "-KILL", "-P", "{lab.sshd.pid}"], check=True)
            """
        )
        run("test_cut.py")
        assert lab.images() == []
        project.makepyfile(test_next=HELLO)
        assert verdicts(run("test_next.py")) == {"test_hello[lab]": "PASSED"}

    def test_that_was_killed_is_no_obstacle_to_the_next(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        project.makepyfile(
            test_killed="""
            import os, signal
            import pytest

            @pytest.mark.kdriver("hello", leaks="allow")
            def test_killed(kdriver):
                kdriver.start()
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            test_next=HELLO,
        )
        assert run("test_killed.py").ret == -signal.SIGKILL
        assert lab.images() != []
        assert verdicts(run("test_next.py")) == {"test_hello[lab]": "PASSED"}

    def test_waits_for_one_that_has_the_machine(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        first = begin_holding(project)
        second = begin(project, "test_second.py")
        until(lambda: len(lab.agent_processes()) > 1)
        (project.path / "go").touch()
        assert first.wait(60) == 0
        assert second.wait(60) == 0

    def test_tells_who_has_the_machine_for_too_long(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts, lab: Lab
    ) -> None:
        choose(project, lab)
        first = begin_holding(project)
        settings = project.path / "kdriver.toml"
        settings.write_text(settings.read_text().replace("timeout = 60", "timeout = 10"))
        result = run("test_second.py")
        (project.path / "go").touch()
        assert first.wait(60) == 0
        assert verdicts(result) == {"test_hello[lab]": "ERROR"}
        result.stdout.fnmatch_lines(["*another run has it: kdagent-*.exe runs there, as process*"])


def begin_holding(project: pytest.Pytester) -> subprocess.Popen[bytes]:
    """A run that has the machine until there is a file "go"; beside it lies one that wants it, too."""
    project.makepyfile(
        test_first="""
        import pathlib, time
        import pytest

        @pytest.mark.kdriver("hello", leaks="allow")
        def test_first(kdriver):
            kdriver.start()
            pathlib.Path("up").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.05)
        """,
        test_second=HELLO,
    )
    first = begin(project, "test_first.py")
    until((project.path / "up").exists)
    return first


class TestARunThatCanTBeginTells:
    @pytest.mark.parametrize(
        "case",
        [
            (
                {"ssh_key": "wrong_key"},
                "*did not let the user * in; tried: the key */wrong_key and *",
            ),
            (
                {"ssh_known_hosts": "nobody"},
                "*shows the host key ssh-ed25519 * knows none of this*",
            ),
            ({"port": 1, "timeout": 1}, "*did not take the connection: *refused*"),
            ({"agent_path": "/proc/kdagent.exe"}, "*/proc/kdagent-*.new can't be written*"),
            ({"ssh_command": "no-such-program {agent}"}, "*exit code 127*not found*"),
        ],
        ids=["key", "host-key", "port", "unwritable", "command"],
    )
    def test_why(
        self,
        project: pytest.Pytester,
        run: Run,
        lab: Lab,
        monkeypatch: pytest.MonkeyPatch,
        case: tuple[dict[str, object], str],
    ) -> None:
        changes, sentence = case
        (project.path / "nobody").write_text("")
        key = lab.sshd.new_key("wrong_key")
        if "ssh_key" in changes:
            changes = {"ssh_key": str(key)}
        choose(project, lab, **changes)
        monkeypatch.setenv("KDRIVER_PASSWORD_LAB", "tell-nobody")
        project.makepyfile(HELLO + HELLO.replace("test_hello", "test_again"))
        result = run("--showlocals", "--full-trace")
        result.assert_outcomes(errors=2)
        result.stdout.fnmatch_lines([f"*target 'lab': {sentence}"])
        for line in ("*Traceback*", "*tell-nobody*"):
            result.stdout.no_fnmatch_line(line)
            result.stderr.no_fnmatch_line(line)
