"""What is in the wheel, what an editable install leaves out, and that an installed wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pefile
import pytest

from pytest_kdriver.guest import executable

ROOT = Path(__file__).resolve().parents[2]
AGENT = "pytest_kdriver/guest/kdagent.exe"
FORWARDER = "pytest_kdriver/guest/kdtrace"
IMAGES = "pytest_kdriver/_images"


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution, as an index would have them."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT)
    assert [path.suffix for path in sorted(output.iterdir())] == [".whl", ".gz"]
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of a new environment that has the wheel; dependencies are this one's."""
    environment = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    programs = environment / "bin"
    site_packages = run(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).strip()
    run(
        *(sys.executable, "-m", "pip", "--python", programs / "python"),
        *("install", "--no-deps", "--no-index", wheel),
    )
    (Path(site_packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def test_the_agent_in_the_wheel_is_a_windows_program(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        agent = pefile.PE(data=archive.read(AGENT))
    assert agent.FILE_HEADER.Machine == pefile.MACHINE_TYPE["IMAGE_FILE_MACHINE_AMD64"]
    assert agent.OPTIONAL_HEADER.Subsystem == pefile.SUBSYSTEM_TYPE["IMAGE_SUBSYSTEM_WINDOWS_CUI"]
    assert not agent.is_dll()


def test_the_forwarder_in_the_wheel_needs_no_library_of_the_guest(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        program = archive.read(FORWARDER)
    assert program.startswith(b"\x7fELF\x02\x01")
    segments, size, count = (
        int.from_bytes(program[at : at + length], "little")
        for at, length in ((32, 8), (54, 2), (56, 2))
    )
    kinds = {
        int.from_bytes(program[at : at + 4], "little")
        for at in range(segments, segments + size * count, size)
    }
    interpreter = 3  # PT_INTERP: the dynamic linker
    assert interpreter not in kinds


def test_programs_are_the_same_wherever_they_were_built(wheel: Path) -> None:
    """A disk image is made anew where they are others."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(AGENT) == executable.AGENT.executable().read_bytes()
        assert archive.read(FORWARDER) == executable.FORWARDER.executable().read_bytes()


def test_the_wheel_is_for_any_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_recipes_of_the_disk_images_are_in_the_wheel(wheel_names: list[str]) -> None:
    recipes = [path for path in (ROOT / "vm/images").rglob("*") if path.is_file()]
    expected = {f"{IMAGES}/{path.relative_to(ROOT / 'vm/images')}" for path in recipes}
    assert f"{IMAGES}/winevm/recipe.toml" in expected
    assert expected <= set(wheel_names)


def test_an_installed_recipe_can_be_run(installed: Path, tmp_path: Path) -> None:
    python = installed / "python"
    told = run(
        *(python, "-c"),
        "from pytest_kdriver.targets.recipe import *\n"
        "recipe = find_recipe('winevm'); print(recipe.folder, recipe.key())",
        cwd=tmp_path,
    )
    folder = Path(told.split()[0])
    assert folder.is_relative_to(installed.parent)
    assert os.access(folder / "build", os.X_OK)


def test_nothing_else_is_in_the_wheel(wheel_names: list[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"pytest_kdriver"}
    assert not [name for name in wheel_names if "/target/" in name or "/tests/" in name]
    assert [name for name in wheel_names if name.endswith((".exe", ".rs", ".pyc"))] == [AGENT]
    assert [name for name in wheel_names if name.endswith("/kdtrace")] == [FORWARDER]


def test_an_editable_install_builds_nothing(tmp_path: Path) -> None:
    build = (
        "import sys; from hatchling.build import build_editable as build; print(build(sys.argv[1]))"
    )
    cargo_target = tmp_path / "cargo"
    name = run(
        *(sys.executable, "-c", build, tmp_path),
        cwd=ROOT,
        env={"CARGO_TARGET_DIR": str(cargo_target)},
    ).split()[-1]
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert not [file for file in archive.namelist() if file.startswith("pytest_kdriver/")]
    assert not cargo_target.exists()


def test_the_installed_wheel_has_the_command(installed: Path, tmp_path: Path) -> None:
    assert "usage: kdriver" in run(installed / "kdriver", "--help", cwd=tmp_path)


def test_the_installed_wheel_is_a_pytest_plugin(installed: Path, tmp_path: Path) -> None:
    python = installed / "python"
    where = run(python, "-c", "import pytest_kdriver; print(pytest_kdriver.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "@pytest.mark.kdriver(" in run(python, "-m", "pytest", "--markers", cwd=tmp_path)
    assert "--kdriver-vm" in run(python, "-m", "pytest", "--help", cwd=tmp_path)
