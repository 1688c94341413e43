"""The installation of a Windows, under a real libvirt, with a CD of our own in the place of Windows'."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.disk_images import Phase, list_images
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.recipe import find_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows.images import Source, build_image, picture
from pytest_kdriver.targets.windows.installation import Limits
from pytest_kdriver.targets.windows.passwords import passwords_directory
from tests.vm.grub_cd import make_cd

ROOT = Path(__file__).parents[2]
LIMITS = Limits(whole=600.0, stall=60.0)
STALLS = Limits(whole=600.0, stall=12.0)
"""For a machine with a BIOS, which reads its CD at once."""

WAITS = "sleep 10000"
PRODUCT_KEY = "AAAAA-BBBBB-CCCCC-DDDDD-EEEEE"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder for what can't be made again."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def run(own_cache: Path) -> Iterator[Run]:
    run = Run()
    yield run
    run.close(REMOVERS)


@pytest.mark.parametrize("name", ["win10", "server2022", "win11", "server2025"])
def test_the_machine_of_each_recipe_reaches_its_cd(
    name: str,
    run: Run,
    libvirt_uri: str,
    guest_folder: Path,
    there: Callable[[], set[str]],
) -> None:
    phases: list[str] = []
    consoles: list[str] = []

    def note(phase: Phase) -> None:
        phases.append(phase.name)
        console = run.path / "installation/console.log"
        consoles.append(console.read_text(errors="replace") if console.exists() else "")

    before = there()
    source = Source(iso=make_cd(guest_folder, "sleep 5\nhalt"), uri=libvirt_uri)
    with pytest.raises(TargetError, match="the machine stopped: the guest shut itself down"):
        build_image(find_recipe(name, ROOT), source, run, note, limits=LIMITS)
    assert phases == ["hashing windows.iso", "starting from the CD", "loading Windows Setup"]
    assert "A key was pressed" in consoles[-1]
    assert there() == before
    assert list(passwords_directory().iterdir()) == []
    assert list_images() == [i for i in list_images() if i.name != name]


def test_a_stall_is_told_with_a_picture(
    run: Run, libvirt_uri: str, guest_folder: Path, there: Callable[[], set[str]]
) -> None:
    recipe = find_recipe("win10", ROOT)
    source = Source(iso=make_cd(guest_folder, WAITS), uri=libvirt_uri)
    before = there()
    with pytest.raises(TargetError, match=r"neither its disk nor its CD was used") as failure:
        build_image(recipe, source, run, lambda _: None, limits=STALLS)
    told = str(failure.value)
    assert "0 MiB written to the disk, 0 restarts" in told
    assert told.endswith(f"its screen: {picture(recipe)}")
    assert picture(recipe).read_bytes().startswith(b"\x89PNG")
    assert there() == before


def test_a_cd_that_never_asks_is_told(
    run: Run, libvirt_uri: str, guest_folder: Path, there: Callable[[], set[str]]
) -> None:
    iso = guest_folder / "no.iso"
    iso.write_bytes(bytes(1 << 20))
    source = Source(iso=iso, uri=libvirt_uri)
    before = there()
    with pytest.raises(TargetError, match=r"nor its CD was used.*; 0 MiB were read from the CD"):
        build_image(find_recipe("win10", ROOT), source, run, lambda _: None, limits=STALLS)
    assert there() == before


def test_restarts_are_seen_and_do_not_ask_for_a_key_again(
    run: Run, libvirt_uri: str, guest_folder: Path, there: Callable[[], set[str]]
) -> None:
    phases: list[str] = []
    source = Source(iso=make_cd(guest_folder, "sleep 5\nreboot"), uri=libvirt_uri)
    before = there()
    with pytest.raises(TargetError, match=r"nor its CD was used .* 1 restarts"):
        build_image(
            find_recipe("win10", ROOT),
            source,
            run,
            lambda phase: phases.append(phase.name),
            limits=STALLS,
        )
    assert phases[-2:] == ["loading Windows Setup", "restart 1"]
    assert there() == before


def test_the_deadline_is_told(
    run: Run, libvirt_uri: str, guest_folder: Path, there: Callable[[], set[str]]
) -> None:
    source = Source(iso=make_cd(guest_folder, WAITS), uri=libvirt_uri)
    before = there()
    with pytest.raises(TargetError, match=r"it was not over within 0\.25 minutes \(--timeout"):
        build_image(
            find_recipe("win10", ROOT), source, run, lambda _: None, limits=Limits(whole=15.0)
        )
    assert there() == before


@pytest.fixture
def build(
    tmp_path: Path, own_cache: Path, libvirt_uri: str, guest_folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """``kdriver image build win10``, when its guest has begun to load what is on the CD."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "kdriver.toml").write_text(
        f'[targets.win10]\nkind = "libvirt"\nimage = "win10"\nuri = "{libvirt_uri}"\n'
    )
    key = tmp_path / "product-key"
    key.write_text(f"{PRODUCT_KEY}\n")
    run_main = "import sys; from pytest_kdriver.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run_main, "image", "build", "win10"]
    iso = make_cd(guest_folder, WAITS)
    with subprocess.Popen(
        [*command, "--iso", str(iso), "--product-key-file", str(key)],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        told = b""
        for line in process.stderr:
            told += line
            if b"loading Windows Setup" in line:
                break
        else:
            pytest.fail(told.decode())
        yield process
        process.kill()


def _secrets(state: Path) -> list[bytes]:
    """The password that is kept meanwhile, as it can stand in a file, and the product key."""
    (file,) = (state / "pytest-kdriver/windows-passwords").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    texts = [file.read_text(), PRODUCT_KEY]
    return [text.encode(code) for text in texts for code in ("utf-8", "utf-16-le")]


def test_no_secret_is_in_a_process_list_or_a_file_that_others_read(
    build: subprocess.Popen[bytes], state: Path, vm_cache: Path, tmp_path: Path
) -> None:
    secrets = _secrets(state)
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            content = cmdline.read_bytes()
        except OSError:  # gone meanwhile
            continue
        assert not [secret for secret in secrets if secret in content], cmdline
    (run,) = (vm_cache / "runs").glob(f"{build.pid}-*")
    own = {
        run / "installation/provisioning.iso",
        state / f"pytest-kdriver/windows-passwords/{_only(state)}",
        tmp_path / "product-key",
    }
    found = set()
    for top in (vm_cache, state, tmp_path):
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 100 << 20:
                content = path.read_bytes()
                if any(secret in content for secret in secrets):
                    found.add(path)
    assert found == own
    for path in own - {tmp_path / "product-key"}:
        assert path.stat().st_mode & 0o077 == 0


def _only(state: Path) -> str:
    (file,) = (state / "pytest-kdriver/windows-passwords").iterdir()
    return file.name


@pytest.fixture
def left(there: Callable[[], set[str]]) -> Callable[[], set[str]]:
    """What there is of machines, and was not there before."""
    before = there()
    return lambda: there() - before


def test_ctrl_c_ends_all(
    left: Callable[[], set[str]], build: subprocess.Popen[bytes], state: Path
) -> None:
    secrets = _secrets(state)
    build.send_signal(signal.SIGINT)
    out, err = build.communicate(timeout=60)
    assert build.returncode == 130
    assert not [secret for secret in secrets if secret in out + err]
    assert not left()
    assert list((state / "pytest-kdriver/windows-passwords").iterdir()) == []


def test_what_a_killed_build_leaves_is_removed_by_gc(
    left: Callable[[], set[str]], build: subprocess.Popen[bytes]
) -> None:
    build.kill()
    build.wait()
    assert [name for name in left() if "install" in name]
    deadline = time.monotonic() + 60
    while True:
        assert main(["gc"]) == 0
        if not left():
            break
        assert time.monotonic() < deadline, left()
        time.sleep(0.5)
