"""Function, file and line of an image's code, from PDBs and DWARF, and what is said where there is none."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_kdriver.image import symbols
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.pe import read_layout
from pytest_kdriver.image.symbols import Symbols, load_symbols
from pytest_kdriver.source_frame import SourceFrame
from tests.wine.c_drivers.build import compiler

MANIFEST = """
[package]
name = "mine"
version = "0.1.0"
edition = "2021"
"""

SOURCE = """\
#![no_std]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
#[used]
#[link_section = ".drectve"]
static DIRECTIVES: [u8; 63] = *b"/ENTRY:DriverEntry /SUBSYSTEM:NATIVE /NODEFAULTLIB:msvcrt      ";
#[no_mangle]
pub extern "system" fn DriverEntry(object: *mut u32, _: usize) -> i32 {
    outer(object)
}
#[inline(never)]
fn outer(object: *mut u32) -> i32 {
    inner(object);
    0
}
#[inline(always)]
fn inner(object: *mut u32) {
    unsafe { core::arch::asm!("mov dword ptr [{}], 7", in(reg) object) };
}
"""

C_SOURCE = """\
static inline __attribute__((always_inline)) void inner(volatile int *object) { *object = 7; }
__attribute__((noinline)) static int outer(volatile int *object)
{
    inner(object);
    return 0;
}
int __stdcall DriverEntry(volatile int *object, void *path)
{
    (void)path;
    return outer(object) + 1;
}
"""


@dataclass(frozen=True)
class Build:
    """A Rust driver with its PDB, and the PDB of another build of it.

    ``named_pdb`` is where the image says that its PDB is; it is not there.
    """

    image: Path
    pdb: Path
    other_pdb: Path
    named_pdb: Path


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    root, kept = tmp_path_factory.mktemp("mine"), tmp_path_factory.mktemp("kept")
    source = root / "src" / "lib.rs"
    source.parent.mkdir()
    (root / "Cargo.toml").write_text(MANIFEST)
    source.write_text(SOURCE)
    named_pdb = kept / "where it was built" / "named.pdb"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CARGO_ENCODED_RUSTFLAGS", f"-Clink-arg=/PDBALTPATH:{named_pdb}")
        built = Cargo(root / "Cargo.toml").build("mine")
        image = Path(shutil.copy(built, kept))
        pdb = Path(shutil.copy(built.with_suffix(".pdb"), kept))
        source.write_text(SOURCE.replace("    0\n", "    1\n"))
        built = Cargo(root / "Cargo.toml").build("mine")
        other_pdb = Path(shutil.copy(built.with_suffix(".pdb"), kept / "other.pdb"))
    shutil.rmtree(root)
    return Build(image, pdb, other_pdb, named_pdb)


@pytest.fixture
def image(build: Build, tmp_path: Path) -> Path:
    """A copy of the driver, with its PDB beside it."""
    shutil.copy(build.pdb, tmp_path)
    return Path(shutil.copy(build.image, tmp_path))


@dataclass
class Location:
    symbol: str
    full_path: str | None = "a.c"
    line: int = 1


@dataclass(frozen=True)
class Table:
    """A look-up table whose every address is in one function."""

    symbol: str

    def lookup(self, _: int, /) -> list[Location]:
        return [Location(self.symbol)]


def line_of(text: str) -> int:
    (number,) = (n for n, line in enumerate(SOURCE.splitlines(), 1) if text in line)
    return number


def located(symbols: Symbols, image: Path) -> set[tuple[SourceFrame, ...]]:
    return {symbols.locate(offset) for offset in range(0x1000, read_layout(image).size)}


def functions(frames: tuple[SourceFrame, ...]) -> list[str]:
    return [frame.function.rsplit("::", 1)[-1] for frame in frames]


def test_a_pdb_knows_function_file_and_line(image: Path) -> None:
    symbols = load_symbols(image)
    assert symbols.problem is None
    (entry,) = symbols.locate(read_layout(image).entry)
    assert entry.function.endswith("DriverEntry")
    assert entry.file is not None
    assert entry.file.endswith("src/lib.rs")
    assert entry.line == line_of("fn DriverEntry")


def test_inlined_functions_come_first(image: Path) -> None:
    stacks = [f for f in located(load_symbols(image), image) if "inner" in functions(f)]
    assert stacks
    for frames in stacks:
        assert functions(frames)[-2:] == ["inner", "outer"]
        assert frames[-2].line == line_of("asm!")
        assert frames[-1].line == line_of("    inner(object);")


def test_dwarf_in_the_image_is_known_too(tmp_path: Path) -> None:
    image = tmp_path / "c driver.sys"
    (tmp_path / "c.c").write_text(C_SOURCE)
    subprocess.run(
        [
            *(compiler(), "-g", "-O1", "-o", image, "c.c", "-shared", "-nostdlib"),
            *("-Wl,--subsystem,native", "-Wl,--entry,DriverEntry"),
        ],
        cwd=tmp_path,
        check=True,
    )
    symbols = load_symbols(image)
    assert symbols.problem is None
    file = str(tmp_path / "c.c")
    assert symbols.locate(read_layout(image).entry) == (SourceFrame("DriverEntry", file, 8),)
    assert (SourceFrame("inner", file, 1), SourceFrame("outer", file, 4)) in located(symbols, image)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("mine::outer", "mine::outer"),
        ("Pool::grow(unsigned int)", "Pool::grow"),
        ("(anonymous namespace)::grow(int)", "(anonymous namespace)::grow"),
        ("call<void (*)(int)>(int)", "call<void (*)(int)>"),
        ("call_once<fn() -> u32, ()>", "call_once<fn() -> u32, ()>"),
        ("call_once<fn() -> u32, ()>(int)", "call_once<fn() -> u32, ()>"),
        ("Pool::operator->()", "Pool::operator->"),
    ],
)
def test_a_name_is_cut_at_its_parameters(symbol: str, name: str) -> None:
    assert Symbols(None, Table(symbol)).locate(0) == (SourceFrame(name, "a.c", 1),)


def test_what_is_no_code_is_not_known(image: Path) -> None:
    symbols = load_symbols(image)
    for offset in (-1, 0, 1 << 31, 1 << 40, (1 << 64) - 1):
        assert symbols.locate(offset) == ()


def test_the_pdb_may_have_the_name_that_the_image_gives_it(image: Path) -> None:
    image.with_suffix(".pdb").rename(image.with_name("named.pdb"))
    assert load_symbols(image).problem is None


def test_the_pdb_may_be_where_it_was_built(build: Build, image: Path) -> None:
    build.named_pdb.parent.mkdir(exist_ok=True)
    image.with_suffix(".pdb").rename(build.named_pdb)
    assert load_symbols(image).problem is None
    build.named_pdb.unlink()


def test_an_image_without_debug_information_says_so(image: Path) -> None:
    pdb = image.with_suffix(".pdb")
    pdb.unlink()
    symbols = load_symbols(image)
    assert symbols.problem == (
        f"mine.sys has no debug information, and there is no {pdb}: build it with debug information"
    )
    assert symbols.locate(read_layout(image).entry) == ()


def test_a_pdb_of_another_build_is_not_used(build: Build, image: Path) -> None:
    pdb = Path(shutil.copy(build.other_pdb, image.with_suffix(".pdb")))
    symbols = load_symbols(image)
    assert symbols.problem == (
        f"{pdb} is of another build than mine.sys: keep the two of one build together"
    )
    assert symbols.locate(read_layout(image).entry) == ()


def test_symbols_are_those_of_the_files_as_they_are_now(image: Path) -> None:
    pdb = image.with_suffix(".pdb")
    hidden = pdb.rename(pdb.with_suffix(".later"))
    assert load_symbols(image).problem is not None
    hidden.rename(pdb)
    assert load_symbols(image).problem is None


def test_symbols_are_those_of_every_file_that_may_be_the_pdb(build: Build, image: Path) -> None:
    pdb = image.with_suffix(".pdb")
    hidden = pdb.rename(pdb.with_suffix(".later"))
    build.named_pdb.parent.mkdir(exist_ok=True)
    for place in (image.with_name("named.pdb"), build.named_pdb):
        assert load_symbols(image).problem is not None
        hidden.rename(place)
        assert load_symbols(image).problem is None
        place.rename(hidden)


def test_a_reader_that_did_not_run_or_took_too_long_is_tried_again(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/no/such/python")
        assert "does not run: No such file" in str(load_symbols(image).problem)
    with monkeypatch.context() as slow:
        slow.setattr(symbols, "READ_TIMEOUT", 0.001)
        assert "mine.sys took more than 0.001 s to read" in str(load_symbols(image).problem)
    assert load_symbols(image).problem is None


def test_less_memory_than_the_reader_asks_for_will_do(image: Path) -> None:
    code = (
        "import pathlib, sys; from pytest_kdriver.image.symbols import load_symbols; "
        "print(load_symbols(pathlib.Path(sys.argv[1])).problem)"
    )
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", sys.executable, "-c", code, image],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"


def test_a_reader_that_fails_is_told_by_the_image_and_no_exception(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "symbolic.py").write_text("raise ValueError('what it can not do')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert load_symbols(image).problem == (
        f"the debug information of {image} can't be read: its reader failed: what it can not do"
    )


def test_a_pdb_s_path_that_names_no_file_does_no_harm(build: Build, image: Path) -> None:
    content, name = image.read_bytes(), str(build.named_pdb).encode()
    assert name in content
    image.write_bytes(content.replace(name, b"C:\\".ljust(len(name), b"\0")))
    image.with_suffix(".pdb").unlink()
    assert "mine.sys has no debug information" in str(load_symbols(image).problem)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"MZ", b"Microsoft C/C++ MSF 7.00\r\n\x1aDS\0\0\0"]
)
def test_files_that_are_something_else_are_told(image: Path, content: bytes) -> None:
    image.with_suffix(".pdb").write_bytes(content)
    assert "mine.pdb can't be read: " in str(load_symbols(image).problem)
    image.write_bytes(content)
    assert "mine.sys can't be read: " in str(load_symbols(image).problem)
    image.unlink()
    assert "mine.sys can't be read: " in str(load_symbols(image).problem)


def test_a_broken_pdb_does_no_harm(image: Path) -> None:
    pdb = image.with_suffix(".pdb")
    whole = pdb.read_bytes()
    for seed in range(8):
        chance = random.Random(seed)
        broken = bytearray(whole[: chance.choice([len(whole), len(whole) // 2])])
        for _ in range(1000):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        pdb.write_bytes(broken)
        for frames in located(load_symbols(image), image):
            assert all(frame.function for frame in frames)


def test_a_pdb_that_brings_its_reader_down_is_told(image: Path) -> None:
    pdb = image.with_suffix(".pdb")
    pdb.write_bytes(with_a_circle(pdb.read_bytes()))
    assert "mine.sys is broken: it brought its reader down" in str(load_symbols(image).problem)


def with_a_circle(pdb: bytes) -> bytes:
    """The PDB, with each list of parameters made its own first one.

    A PDB is a file system of blocks, whose stream 2 has the types, one record behind the other:
    https://llvm.org/docs/PDB/MsfFile.html, https://llvm.org/docs/PDB/TpiStream.html.
    """
    size, _, _, directory_bytes, _, directory_map = struct.unpack_from("<6I", pdb, 32)
    count = -(-directory_bytes // size)
    directory = b"".join(
        pdb[block * size : (block + 1) * size]
        for block in struct.unpack_from(f"<{count}I", pdb, directory_map * size)
    )
    (streams,) = struct.unpack_from("<I", directory)
    sizes = struct.unpack_from(f"<{streams}I", directory, 4)
    counts = [-(-stream // size) for stream in sizes]
    first = sum(counts[:2])
    blocks = struct.unpack_from(f"<{first + counts[2]}I", directory, 4 + 4 * streams)[first:]
    types = bytearray(b"".join(pdb[block * size : (block + 1) * size] for block in blocks))
    _, at, index = struct.unpack_from("<3I", types)
    while at < sizes[2]:
        length, kind = struct.unpack_from("<HH", types, at)
        if (
            kind == 0x1201 and length > 6
        ):  # LF_ARGLIST: their number follows, then their types' indices
            struct.pack_into("<I", types, at + 8, index)
        at += 2 + length
        index += 1
    circle = bytearray(pdb)
    for number, block in enumerate(blocks):
        circle[block * size : (block + 1) * size] = types[number * size : (number + 1) * size]
    return bytes(circle)
