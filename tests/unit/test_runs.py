"""Run folders: what dead runs left is removed, what living ones have is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_kdriver.targets.runs import Run, collect_garbage, runs_directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


DIES = """
import sys
from pathlib import Path
from pytest_kdriver.targets.runs import Run
run = Run()
for name in sys.argv[1:]:
    run.record("thing", Path(name))
print(run.path, flush=True)
sys.stdin.read()
"""


def dead_run(*things: Path) -> Path:
    """The folder of a run whose owner was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", DIES, *map(str, things)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
    return path


def test_a_run_that_is_closed_leaves_nothing() -> None:
    run = Run()
    assert run.path.is_dir()
    run.close()
    run.close()
    assert list(runs_directory().iterdir()) == []


def test_closing_removes_what_is_recorded_and_was_not_forgotten(tmp_path: Path) -> None:
    run = Run()
    for name in ("one", "two", "three"):
        run.record("thing", tmp_path / name)
    run.record("other", tmp_path / "two")
    run.forget("thing", tmp_path / "two")
    removed: list[Path] = []
    run.close({"thing": removed.append})
    assert removed == [tmp_path / "three", tmp_path / "one"]
    assert list(runs_directory().iterdir()) == []


def test_what_closing_can_t_remove_is_left_to_the_next_run(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise OSError("its libvirt is not there")

    run = Run()
    run.record("thing", tmp_path)
    run.close({"thing": refuse})
    removed: list[Path] = []
    assert collect_garbage({"thing": removed.append}) == [run.path]
    assert removed == [tmp_path]


def test_the_record_goes_last(tmp_path: Path) -> None:
    run = Run()
    run.record("thing", tmp_path)
    (run.path / "clone").mkdir()
    (run.path / "clone").chmod(0o700)
    with held(run.path / "clone"):
        run.close()
        assert (run.path / "resources").exists()
    assert collect_garbage({}) == [run.path]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have ``rm`` fail at a folder, which root can do only to what is mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs to mount something")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_dead_run_s_things_are_removed_the_last_made_first(tmp_path: Path) -> None:
    folder = dead_run(tmp_path / "one", tmp_path / "two")
    removed: list[Path] = []
    assert collect_garbage({"thing": removed.append}) == [folder]
    assert removed == [tmp_path / "two", tmp_path / "one"]
    assert not folder.exists()
    assert collect_garbage({"thing": removed.append}) == []


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    run = Run()
    run.record("thing", tmp_path)
    assert collect_garbage({"thing": lambda _: pytest.fail("it lives")}) == []
    assert run.path.is_dir()
    run.close()


def test_an_owner_that_died_while_it_wrote_does_no_harm(tmp_path: Path) -> None:
    folder = dead_run(tmp_path / "one")
    with (folder / "resources").open("a", encoding="utf-8") as file:
        file.write('{"kind": "thi')
    removed: list[Path] = []
    assert collect_garbage({"thing": removed.append}) == [folder]
    assert removed == [tmp_path / "one"]


def test_an_owner_that_died_before_it_wrote_leaves_a_folder_that_goes_too() -> None:
    hidden = runs_directory() / ".999999999-abc"
    hidden.mkdir(parents=True)
    assert collect_garbage({}) == [hidden]


def test_a_tree_however_deep_is_removed(tmp_path: Path) -> None:
    folder = dead_run()
    deep = os.open(folder, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    assert collect_garbage({}) == [folder]
    assert not folder.exists()


def test_what_can_t_be_removed_is_no_obstacle_to_the_rest(tmp_path: Path) -> None:
    first, second = sorted([dead_run(tmp_path / "one"), dead_run(tmp_path / "two")])

    def remove(path: Path) -> None:
        if path.name == "one":
            raise PermissionError("it is another user's")

    assert len(collect_garbage({"thing": remove})) == 1
    assert first.exists() != second.exists()


def test_the_first_run_of_all_finds_nothing() -> None:
    assert collect_garbage({}) == []
