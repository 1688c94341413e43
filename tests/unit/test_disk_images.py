"""Disk images: made once from a recipe, whole or not at all, found again, removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.errors import ConfigError, TargetError
from pytest_kdriver.paths import cache_directory
from pytest_kdriver.targets import disk_images
from pytest_kdriver.targets.disk_images import (
    BASE_DIGITS,
    DiskImage,
    Phase,
    booted_directory,
    ensure,
    is_current,
    list_images,
    make_once,
    remove,
)
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.recipe import Recipe, find_recipe, find_recipes, read_recipe
from pytest_kdriver.targets.runs import Run, collect_garbage
from pytest_kdriver.targets.windows.passwords import keep_password, password_file

MAKES_A_DISK = """#!/bin/sh
echo counting
date +%s.%N >> made
echo writing
echo content > "$1/disk.qcow2"
"""
HANGS = """#!/bin/sh
sleep 600 &
echo $! > sleeper
echo "hanging"
wait
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, but for the programs that take long to build."""
    real, own = cache_directory(), tmp_path / "cache"
    own.mkdir()
    (real / "programs").mkdir(parents=True, exist_ok=True)
    (own / "programs").symlink_to(real / "programs")
    monkeypatch.setenv("KDRIVER_CACHE", str(own))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return own


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    run.close()


Write = Callable[..., Recipe]


@pytest.fixture
def write_recipe(tmp_path: Path) -> Write:
    """Writes a recipe of a project in ``tmp_path``: its build program, its ``recipe.toml``."""

    def write(build: str = MAKES_A_DISK, toml: str = "", *, name: str = "mine") -> Recipe:
        folder = tmp_path / "vm/images" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.toml").write_text(toml)
        (folder / "build").write_text(build)
        (folder / "build").chmod(0o755)
        return read_recipe(folder)

    return write


def quietly(phase: Phase) -> None:
    pass


def test_an_image_is_made_once(write_recipe: Write, run: Run) -> None:
    image = ensure(write_recipe(), run, quietly)
    assert image.disk.read_text() == "content\n"
    assert image.disk.stat().st_mode & 0o777 == 0o400
    assert image.is_unchanged
    made = (write_recipe().folder / "made").read_text()
    assert len(made.splitlines()) == 1


def test_what_was_made_is_found_again(tmp_path: Path, write_recipe: Write, run: Run) -> None:
    script = '#!/bin/sh\necho content > "$1/disk.qcow2"\n'
    first = ensure(write_recipe(script), run, quietly)
    phases: list[Phase] = []
    assert ensure(write_recipe(script), run, phases.append) == first
    assert phases == []


def test_another_user_s_image_is_used_though_its_use_can_t_be_noted(
    write_recipe: Write, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    script = '#!/bin/sh\necho content > "$1/disk.qcow2"\n'
    image = ensure(write_recipe(script), run, quietly)
    monkeypatch.setattr(os, "utime", refuse)
    assert ensure(write_recipe(script), run, quietly) == image


def test_another_content_is_another_image(write_recipe: Write, run: Run) -> None:
    first = ensure(write_recipe('#!/bin/sh\necho 1 > "$1/disk.qcow2"\n'), run, quietly)
    second = ensure(write_recipe('#!/bin/sh\necho 2 > "$1/disk.qcow2"\n'), run, quietly)
    assert first.folder != second.folder
    assert first.sha256 != second.sha256
    assert first.disk.exists()


def test_a_recipe_s_key_changes_with_its_files_and_what_may_be_run(write_recipe: Write) -> None:
    keys = {write_recipe().key()}
    recipe = write_recipe()
    (recipe.folder / "more").write_text("one")
    keys.add(recipe.key())
    (recipe.folder / "more").chmod(0o755)
    keys.add(recipe.key())
    (recipe.folder / "more").rename(recipe.folder / "other")
    keys.add(recipe.key())
    assert len(keys) == 4
    assert recipe.key() in keys
    compiled = recipe.folder / "files/__pycache__/program.pyc"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"by pip, where it is installed from a wheel")
    assert recipe.key() in keys


def test_each_phase_is_told_when_it_begins(write_recipe: Write, run: Run) -> None:
    phases: list[Phase] = []
    ensure(write_recipe(), run, phases.append)
    assert [phase.name for phase in phases] == ["counting", "writing", "hashing its disk"]
    assert [phase.elapsed for phase in phases] == sorted(phase.elapsed for phase in phases)


def test_a_build_gets_what_goes_into_a_guest(write_recipe: Write, run: Run) -> None:
    script = """#!/bin/sh
    set -e
    cat "$KDRIVER_WINE_SETTINGS" "$KDRIVER_WINE_ENVIRONMENT" > "$1/disk.qcow2"
    test "$(head -c 2 "$KDRIVER_AGENT")" = MZ
    "$KDRIVER_FORWARDER" 2>&1 | grep --quiet usage
    """
    text = ensure(write_recipe(script), run, quietly).disk.read_text()
    assert '"RelayInclude"="ntoskrnl.exe.ExAllocatePool;' in text
    assert "\nWINEDEBUG=-all,warn+debugstr," in text


def test_what_a_target_is_like_is_told_with_the_image_s_own_paths(
    write_recipe: Write, run: Run
) -> None:
    toml = '[target]\nkernel = "vmlinuz"\nmemory = 512\ntpm = true\ncmdline = "a=\\"b\\" \\\\"\n'
    image = ensure(write_recipe(toml=toml), run, quietly)
    assert image.target == {
        "kernel": image.folder / "vmlinuz",
        "memory": 512,
        "tpm": True,
        "cmdline": 'a="b" \\',
    }


@pytest.mark.parametrize(
    ("build", "told"),
    [
        ("#!/bin/sh\necho unpacking\necho 'E: no such mirror' >&2\nexit 3\n", "exit code 3"),
        ("#!/bin/sh\necho unpacking\necho 'E: no such mirror' >&2\n", "made no disk.qcow2"),
    ],
)
def test_a_build_that_fails_says_where_and_leaves_nothing(
    build: str, told: str, write_recipe: Write, run: Run, cache: Path
) -> None:
    with pytest.raises(TargetError) as caught:
        ensure(write_recipe(build), run, quietly)
    assert told in str(caught.value)
    assert "in the phase 'unpacking'" in str(caught.value)
    assert "    E: no such mirror" in str(caught.value)
    log = cache / "disks/mine.log"
    assert str(log) in str(caught.value)
    assert log.read_text() == "E: no such mirror\n"
    assert list_images() == []
    assert not list(run.path.glob("disk-*"))


def test_a_disk_that_is_full_is_called_so(write_recipe: Write, run: Run) -> None:
    full = "#!/bin/sh\nls / > /dev/full\n"
    with pytest.raises(TargetError, match="free some, or set KDRIVER_CACHE"):
        ensure(write_recipe(full), run, quietly)


def test_room_is_looked_for_before_anything_is_made(write_recipe: Write, run: Run) -> None:
    recipe = write_recipe(toml=f"room = {1 << 40}\n")
    with pytest.raises(TargetError, match=r"takes 1099511627776 MiB, and \d+ MiB are free in "):
        ensure(recipe, run, quietly)
    assert not (recipe.folder / "made").exists()


def test_a_program_that_is_missing_is_named_with_its_package(write_recipe: Write, run: Run) -> None:
    recipe = write_recipe(toml='programs = ["sh", "kdriver-none"]\npackages = ["some-tools"]\n')
    with pytest.raises(TargetError, match="kdriver-none must be .* apt-get install some-tools"):
        ensure(recipe, run, quietly)


def test_an_interrupted_build_ends_and_leaves_nothing(write_recipe: Write, run: Run) -> None:
    def interrupt(phase: Phase) -> None:
        raise KeyboardInterrupt

    recipe = write_recipe(HANGS)
    with pytest.raises(KeyboardInterrupt):
        ensure(recipe, run, interrupt)
    assert is_gone(int((recipe.folder / "sleeper").read_text()))
    assert list_images() == []
    assert not list(run.path.glob("disk-*"))


def test_what_a_killed_build_left_is_removed_by_the_next_run(
    write_recipe: Write, cache: Path
) -> None:
    recipe = write_recipe(HANGS)
    program = (
        "import sys; from pathlib import Path; from pytest_kdriver.targets.disk_images import *\n"
        "ensure(read_recipe(Path(sys.argv[1])), Run(), lambda phase: print(phase.name, flush=True))"
    ).replace("\n", "\nfrom pytest_kdriver.targets.recipe import read_recipe\n", 1)
    with subprocess.Popen(
        [sys.executable, "-c", program, recipe.folder], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging\n"
        process.kill()
    assert list((cache / "runs").glob("*/disk-mine"))
    collect_garbage(REMOVERS)
    assert list((cache / "runs").iterdir()) == []
    os.kill(int((recipe.folder / "sleeper").read_text()), signal.SIGKILL)


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_of_two_at_once_one_makes_it_and_the_other_waits(write_recipe: Write) -> None:
    script = """#!/bin/sh
    echo x >> ../made-by
    echo begun
    while [ ! -e ../go ]; do sleep 0.01; done
    echo content > "$1/disk.qcow2"
    """
    recipe = write_recipe(script)
    images: list[DiskImage] = []
    begun, waits = threading.Event(), threading.Event()

    def make(progress: Callable[[Phase], None]) -> None:
        run = Run()
        try:
            images.append(ensure(recipe, run, progress))
        finally:
            run.close()

    def told(event: threading.Event, beginning: str) -> Callable[[Phase], None]:
        return lambda phase: event.set() if phase.name.startswith(beginning) else None

    threads = [threading.Thread(target=make, args=(told(begun, "begun"),))]
    threads[0].start()
    assert begun.wait(60)
    threads.append(threading.Thread(target=make, args=(told(waits, "waiting for who makes "),)))
    threads[1].start()
    assert waits.wait(60)
    (recipe.folder.parent / "go").touch()
    for thread in threads:
        thread.join()
    assert images[0] == images[1]
    assert (recipe.folder.parent / "made-by").read_text() == "x\n"


def make(name: str, content: int, write_recipe: Write, run: Run) -> DiskImage:
    script = f'#!/bin/sh\necho {content} > "$1/disk.qcow2"\n'
    image = ensure(write_recipe(script, name=name), run, quietly)
    os.utime(image.folder / "image.toml", (content, content))
    return image


def test_few_older_images_of_a_recipe_are_left(write_recipe: Write, run: Run) -> None:
    other = make("other", 1, write_recipe, run)
    images = [make("mine", content, write_recipe, run) for content in range(1, 6)]
    there = [image for image in images if image.folder.exists()]
    assert there == images[-1 - disk_images.OLD_ONES :]
    assert other.folder.exists()


def test_what_is_there_is_listed_by_name_and_last_use(write_recipe: Write, run: Run) -> None:
    images = [make(name, at, write_recipe, run) for name, at in (("b", 1), ("b", 2), ("a", 1))]
    assert list_images() == [images[2], images[1], images[0]]


def test_an_image_is_removed_by_name_or_folder(write_recipe: Write, run: Run) -> None:
    first, second = (make("mine", content, write_recipe, run) for content in (1, 2))
    other = make("other", 1, write_recipe, run)
    booted_directory().mkdir()
    guests = [booted_directory() / f"{i.sha256[:BASE_DIGITS]}-0.qcow2" for i in (first, second)]
    for guest in guests:
        guest.write_bytes(b"what its memory had in it")
    assert remove(first.folder.name) == [first.folder]
    assert list(booted_directory().iterdir()) == guests[1:]
    assert remove("mine") == [second.folder]
    assert list(booted_directory().iterdir()) == []
    assert remove("mine") == []
    assert list_images() == [other]


def test_what_is_not_whole_is_made_anew(write_recipe: Write, run: Run) -> None:
    script = '#!/bin/sh\necho content > "$1/disk.qcow2"\n'
    image = ensure(write_recipe(script), run, quietly)
    (image.folder / "image.toml").write_text("name = ")
    again = ensure(write_recipe(script), run, quietly)
    assert again.folder == image.folder
    assert again.is_unchanged


def test_a_changed_disk_is_seen(write_recipe: Write, run: Run) -> None:
    image = ensure(write_recipe(), run, quietly)
    image.disk.chmod(0o644)
    image.disk.write_text("Content\n")
    assert not image.is_unchanged


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("romo = 1\n", "unknown key 'romo'"),
        ('room = "1"\n', "room is '1'; allowed: MiB, a whole number"),
        ("programs = [1]\n", r"programs is \[1\]; allowed: a list of names"),
        ("as_root = 1\n", "as_root is 1; allowed: true, false"),
        ("target = 1\n", r"write \[target\]"),
        ('[target]\ndisk = "x"\n', "target: unknown key 'disk'"),
        ("[target]\nmemory = 1\n", "target: memory is 1; allowed: MiB, 64 to"),
        ("room", "recipe.toml: "),
    ],
)
def test_a_recipe_that_is_wrong_is_told_so(toml: str, told: str, write_recipe: Write) -> None:
    with pytest.raises(ConfigError, match=told):
        write_recipe(toml=toml)


def test_a_recipe_needs_its_program(write_recipe: Write) -> None:
    recipe = write_recipe()
    (recipe.folder / "build").chmod(0o644)
    with pytest.raises(ConfigError, match="build: there is no such program"):
        read_recipe(recipe.folder)


def test_a_project_s_own_recipe_comes_first(tmp_path: Path, write_recipe: Write) -> None:
    assert find_recipe("winevm", tmp_path).folder != tmp_path / "vm/images/winevm"
    own = write_recipe(name="winevm")
    assert find_recipe("winevm", tmp_path) == own
    names = [recipe.name for recipe in find_recipes(tmp_path)]
    assert names.count("winevm") == 1


@pytest.mark.parametrize("name", ["none", "..", "../images/mine", "", "/etc"])
def test_an_unknown_recipe_is_told_with_those_that_are_known(
    name: str, tmp_path: Path, write_recipe: Write
) -> None:
    write_recipe()
    with pytest.raises(
        ConfigError, match=r"no disk image .*; there are: mine, server2022, .*, winevm;"
    ):
        find_recipe(name, tmp_path)


def test_an_image_that_takes_a_cd_is_found_without_it_or_told_how_to_make(
    write_recipe: Write, run: Run
) -> None:
    windows = '[windows]\nrelease = "w10"\nindex = 1\n'
    recipe = write_recipe(toml=windows, name="mywindows")
    command = "kdriver image build mywindows --iso FILE"
    with pytest.raises(TargetError, match=command):
        ensure(recipe, run, quietly)

    def build(making: Path, phase: Callable[[str], None]) -> dict[str, object]:
        phase("writing")
        (making / "disk.qcow2").write_text("Windows")
        return {"bus": "sata"}

    made = make_once(recipe, f"mywindows-{recipe.key()}-0123", run, quietly, build)
    assert made.target == {"bus": "sata"}
    assert is_current(made, recipe)
    assert ensure(recipe, run, quietly) == made

    keep_password(made.folder.name, "secret")
    (found,) = list_images()
    assert found.target["winrm_password_file"] == password_file(made.folder.name)

    changed = write_recipe(toml=f"{windows}hvci = true\n", name="mywindows")
    with pytest.raises(
        TargetError, match=rf"of another state of it \({made.folder.name}\).*{command}"
    ):
        ensure(changed, run, quietly)
    remove("mywindows")
    assert not password_file(made.folder.name).exists()


def test_a_windows_image_does_not_depend_on_what_can_be_put_in_later(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(toml='[windows]\nrelease = "w10"\nindex = 1\n')
    key = recipe.key()
    monkeypatch.setattr("pytest_kdriver.targets.recipe.SETTINGS", "others")
    assert recipe.key() == key


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("windows = 1", "write \\[windows\\]"),
        ("[windows]\nindex = 1", "release is None; allowed: w10, w11"),
        ('[windows]\nrelease = "w10"', "needs edition = NAME, or index"),
        ('[windows]\nrelease = "w10"\nindex = 1\nedition = "Pro"', "needs edition"),
        ('[windows]\nrelease = "w10"\nindex = 0', "numbers of 1"),
        ('[windows]\nrelease = "w10"\nindex = true', "index is True"),
        ('[windows]\nrelease = "w10"\nedition = ""', "edition is not empty"),
        ('[windows]\nrelease = "w10"\nindex = 1\ndisk = 8', "32 \\(GiB\\)"),
        ('[windows]\nrelease = "w10"\nindex = 1\nlocale = "english"', "a name like en-US"),
        ('[windows]\nrelease = "w10"\nindex = 1\nuser = "a b"', "user is 'a b'"),
        ('[windows]\nrelease = "w10"\nindex = 1\nmore = 1', "unknown key 'more' in"),
    ],
)
def test_what_is_wrong_with_a_windows_is_told(
    write_recipe: Write, toml: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        write_recipe(toml=toml)


def test_the_command_builds_lists_tells_and_removes(
    tmp_path: Path,
    write_recipe: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kdriver.toml").touch()
    monkeypatch.chdir(tmp_path)
    write_recipe('#!/bin/sh\necho writing\necho 1 > "$1/disk.qcow2"\n', 'description = "a test"\n')
    assert main(["image", "info", "mine"]) == 0
    assert "mine: a test\n    not made yet" in capsys.readouterr().out
    assert main(["image", "build", "mine"]) == 0
    told = capsys.readouterr()
    folder = Path(told.out.strip())
    assert (folder / "disk.qcow2").is_file()
    assert [line.split(" s ")[-1].strip() for line in told.err.splitlines()] == [
        "writing",
        "hashing its disk",
        "in all",
    ]
    assert main(["image", "list"]) == 0
    assert f"    {folder.name}, 0 MiB, made 2" in capsys.readouterr().out
    assert main(["image", "info", "mine"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["image", "remove", "mine"]) == 0
    assert not folder.exists()
    assert main(["image", "remove", "mine"]) == 1
    assert "kdriver image list" in capsys.readouterr().err
