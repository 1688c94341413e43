"""Drivers out of cargo workspaces, and other places where an image may lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_kdriver.errors import BuildError, ImageError
from pytest_kdriver.image.cargo import Cargo, find_image
from pytest_kdriver.image.finder import ImageFinder, is_path
from pytest_kdriver.image.pe import read_layout

MANIFEST = """
[package]
name = "mine"
version = "0.1.0"
edition = "2021"

[features]
loud = []
"""

HANDS_ON_STACKS = MANIFEST + "capture-stacks = []\n"

SOURCE = """
#![no_std]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
#[used]
#[link_section = ".drectve"]
static DIRECTIVES: [u8; 63] = *b"/ENTRY:DriverEntry /SUBSYSTEM:NATIVE /NODEFAULTLIB:msvcrt      ";
#[no_mangle]
pub extern "system" fn DriverEntry(_: usize, _: usize) -> i32 { 0 }
"""


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: a distribution's Rust builds ``core`` anew for each."""
    return tmp_path_factory.mktemp("target")


@pytest.fixture
def package(tmp_path: Path, target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver of somebody who left everything open: panic strategy, linker, target, crate type."""
    monkeypatch.setenv("CARGO_TARGET_DIR", str(target_folder))
    root = tmp_path / "a folder für mich"
    (root / "src").mkdir(parents=True)
    (root / "Cargo.toml").write_text(MANIFEST, encoding="utf-8")
    (root / "src" / "lib.rs").write_text(SOURCE, encoding="utf-8")
    return root


def test_whatever_a_package_leaves_open_is_given(package: Path, target_folder: Path) -> None:
    image = Cargo(package / "Cargo.toml").build("mine")
    assert image.name == "mine.sys"
    assert image.is_relative_to(target_folder)
    assert image.with_suffix(".pdb").is_file()
    layout = read_layout(image)
    assert 0 < layout.entry < layout.size


def test_a_build_is_done_once_and_again_when_the_source_changed(package: Path) -> None:
    cargo = Cargo(package / "Cargo.toml")
    image = cargo.build("mine")
    before = image.read_bytes()
    (package / "src" / "lib.rs").write_text(
        SOURCE.replace("i32 { 0 }", "i32 { 7 }"), encoding="utf-8"
    )
    assert cargo.build("mine") == image
    assert image.read_bytes() == before
    assert Cargo(package / "Cargo.toml").build("mine") == image
    assert image.read_bytes() != before


def test_features_make_another_image(package: Path) -> None:
    cargo = Cargo(package / "Cargo.toml")
    assert cargo.build("mine") != cargo.build("mine", features=["loud"])


@pytest.mark.parametrize("profile", ["dev", "release"])
def test_stacks_are_captured_where_the_package_can(package: Path, profile: str) -> None:
    (package / "src" / "lib.rs").write_text(
        SOURCE.replace(
            "i32 { 0 }", 'i32 { if cfg!(feature = "capture-stacks") { 0x57ac } else { 0x1e55 } }'
        ),
        encoding="utf-8",
    )
    without = Cargo(package / "Cargo.toml", profile=profile).build("mine")
    assert (0x57AC).to_bytes(4, "little") not in without.read_bytes()
    (package / "Cargo.toml").write_text(HANDS_ON_STACKS, encoding="utf-8")
    assert Cargo(package / "Cargo.toml", profile=profile).build("mine") == without
    assert (0x57AC).to_bytes(4, "little") in without.read_bytes()


def test_the_profile_is_cargo_s(package: Path) -> None:
    assert "release" in Cargo(package / "Cargo.toml", profile="release").build("mine").parts


def test_what_does_not_compile_shows_cargo_s_output(package: Path) -> None:
    (package / "src" / "lib.rs").write_text("nonsense", encoding="utf-8")
    with pytest.raises(BuildError, match="package 'mine' does not build\n(.|\n)*expected one of"):
        Cargo(package / "Cargo.toml").build("mine")


def test_an_unknown_package_is_told_with_the_known_ones(package: Path) -> None:
    with pytest.raises(BuildError, match="no package 'yours' in .*; there are: mine"):
        Cargo(package / "Cargo.toml").build("yours")


def test_a_package_that_is_a_program_can_t_be_a_driver(package: Path) -> None:
    (package / "src" / "lib.rs").rename(package / "src" / "main.rs")
    with pytest.raises(BuildError, match="'mine' has no library"):
        Cargo(package / "Cargo.toml").build("mine")


def test_a_manifest_that_is_broken_shows_cargo_s_output(package: Path) -> None:
    (package / "Cargo.toml").write_text("[package", encoding="utf-8")
    with pytest.raises(BuildError, match="cargo can't read"):
        Cargo(package / "Cargo.toml").packages()


def test_an_image_is_a_file_or_the_only_one_of_a_package_folder(tmp_path: Path) -> None:
    folder = tmp_path / "hello_package"
    folder.mkdir()
    with pytest.raises(ImageError, match="should have one .sys file in it; it has: none"):
        find_image(folder)
    driver = folder / "hello.sys"
    driver.write_bytes(b"MZ")
    (folder / "hello.inf").write_text("")
    assert find_image(folder) == find_image(driver) == driver
    shutil.copy(driver, folder / "other.sys")
    with pytest.raises(ImageError, match="it has: hello.sys, other.sys"):
        find_image(folder)
    with pytest.raises(ImageError, match="there is no "):
        find_image(folder / "nope.sys")


def test_a_path_is_looked_for_beside_the_test_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        (folder / "x.sys").write_bytes(b"MZ")
    finder = ImageFinder(tmp_path, None)
    assert finder.find("x.sys", beside=tmp_path / "sub") == tmp_path / "sub" / "x.sys"
    assert finder.find("x.sys", beside=tmp_path / "other") == tmp_path / "x.sys"
    assert finder.find("sub/x.sys") == tmp_path / "sub" / "x.sys"
    with pytest.raises(ImageError, match="there is no .*/sub/y.sys and no .*/y.sys"):
        finder.find("y.sys", beside=tmp_path / "sub")


def test_a_package_without_a_workspace_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"set manifest in kdriver.toml or \[tool.kdriver\]"):
        ImageFinder(tmp_path, None).find("hello")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("hello", False),
        ("a/b", True),
        ("x.sys", True),
        ("X.SYS", True),
        ("x.dll", True),
        ("a.b", False),
    ],
)
def test_a_name_with_a_slash_or_an_image_s_ending_is_a_path(name: str, path: bool) -> None:
    assert is_path(name) is path


@pytest.mark.parametrize("content", [b"", b"text", b"MZ", b"MZ" + bytes(100)])
def test_what_is_no_image_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.sys").write_bytes(content)
    with pytest.raises(ImageError, match="x.sys is no Windows image"):
        read_layout(tmp_path / "x.sys")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no"):
        read_layout(tmp_path / "x.sys")
