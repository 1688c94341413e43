"""Pre-flight: what it finds, how bad that is on which guest, and what it says to do."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pefile
import pytest

from pytest_kdriver.image.exports import Availability, KernelExports
from pytest_kdriver.image.preflight import Finding, Guest, Report, Severity, preflight
from pytest_kdriver.ntstatus import NTSTATUS
from tests.pe_builder import (
    DATA,
    DIRECTORIES,
    OPTIONAL_HEADER,
    PAGE,
    SECTIONS,
    TEXT,
    WRITABLE,
    Section,
    build,
    build_module,
    patched,
)
from tests.signature_builder import CERTIFICATE, FIELD, digest_of, pkcs7, with_signature

CHECKSUM = OPTIONAL_HEADER + 64
DLL = 0x2022

Check = Callable[..., Report]


@pytest.fixture
def kernel(tmp_path: Path) -> KernelExports:
    """A kernel with a few functions, two of them stubs."""
    drivers = tmp_path / "windows" / "system32" / "drivers"
    drivers.mkdir(parents=True)
    modules: dict[str, dict[str, str | None]] = {
        "ntoskrnl.exe": {
            "DbgPrint": "",
            "CcCopyRead": None,
            "ExForwarded": "hal.KfForwarded",
            "ExForwardedStub": "hal.KfStub",
            "ExToNowhere": "hal.KfNowhere",
            "ExToNobody": "nobody.Function",
            "ExInACircle": "ntoskrnl.exe.ExInACircle",
        },
        "HAL.dll": {"KfForwarded": "", "KfStub": None},
        "drivers/Ndis.sys": {"NdisOpen": ""},
    }
    for path, exports in modules.items():
        content = build_module(Path(path).name, exports)
        (drivers.parent / path).write_bytes(content)
    return KernelExports(tmp_path / "windows", "Wine 99")


@pytest.fixture
def check(tmp_path: Path, kernel: KernelExports) -> Check:
    """Check an image for Wine, whose kernel is known, or for Windows, whose is not."""

    def check(image: bytes, guest: Guest = "wine") -> Report:
        path = tmp_path / "x.sys"
        path.write_bytes(image)
        return preflight(path, kernel if guest == "wine" else None, guest=guest)

    return check


def signed(image: bytes) -> bytes:
    """The image as far as signing goes here: with a signature that has its digest, and a checksum."""
    image = with_signature(image)
    return patched(image, CHECKSUM, "<I", pefile.PE(data=image).generate_checksum())


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


def codes(report: Report) -> list[tuple[str, str]]:
    return [(finding.severity.value, finding.code) for finding in report.findings]


class TestReport:
    def test_of_a_good_driver_is_empty_on_either_guest(self, check: Check) -> None:
        image = signed(build(imports={"ntoskrnl.exe": ["DbgPrint"]}, pointers=2))
        guests: tuple[Guest, ...] = ("wine", "windows")
        for guest in guests:
            report = check(image, guest)
            assert report.findings == report.errors == report.warnings == ()
            assert str(report) == "x.sys: nothing is wrong"

    def test_has_a_line_for_each_finding(self, check: Check) -> None:
        report = check(
            build(imports={"kernel32.dll": ["Sleep"]}, text=TEXT | WRITABLE, subsystem=2)
        )
        assert codes(report) == [
            ("warning", "subsystem"),
            ("warning", "writable-code"),
            ("error", "user-mode"),
        ]
        assert [finding.code for finding in report.errors] == ["user-mode"]
        assert [finding.code for finding in report.warnings] == ["subsystem", "writable-code"]
        assert str(report).splitlines()[0] == (
            "warning: x.sys: its subsystem is WINDOWS_GUI, a driver's is NATIVE: link with "
            "/SUBSYSTEM:NATIVE (lld-link, link.exe) or --subsystem native (mingw ld) [subsystem]"
        )


class TestHeaders:
    def test_of_a_dll_for_programs_are_an_error_on_wine(self, check: Check) -> None:
        image = signed(build(subsystem=3, characteristics=DLL))
        assert codes(check(image)) == [("error", "subsystem")]
        assert codes(check(image, "windows")) == [("warning", "subsystem")]
        assert "WINDOWS_CUI" in str(check(image))

    def test_name_a_subsystem_that_nobody_knows_by_its_number(self, check: Check) -> None:
        assert "its subsystem is 77," in only(check(build(subsystem=77))).message

    @pytest.mark.parametrize(
        ("entry", "told"),
        [
            (0, "it has no entry point, so DriverEntry is never called"),
            (0x90000, "its entry point, 0x90000, is outside of its sections"),
            (2 * PAGE, "its entry point, 0x2000, is in .rdata, which is not executable"),
        ],
    )
    def test_have_an_entry_point_in_code(self, check: Check, entry: int, told: str) -> None:
        finding = only(check(build(entry=entry)))
        assert (finding.severity, finding.code) == (Severity.ERROR, "entry")
        assert finding.message.startswith(f"x.sys: {told}: link with /ENTRY:DriverEntry")

    def test_without_relocations_are_an_error_on_windows(self, check: Check) -> None:
        image = signed(build(characteristics=0x23))
        assert codes(check(image)) == [("warning", "relocations")]
        finding = only(check(image, "windows"))
        assert finding.severity is Severity.ERROR
        assert "it can run at 0x140000000 only" in finding.message
        assert "Link without /FIXED" in finding.message


class TestSections:
    def test_that_are_truncated_are_the_one_thing_that_counts(self, check: Check) -> None:
        image = build(imports={"kernel32.dll": ["Sleep"]})
        finding = only(check(image[:-1]))
        assert (finding.severity, finding.code) == (Severity.ERROR, "truncated")
        assert (
            f"ends at {len(image)} in the file, which has {len(image) - 1} bytes" in finding.message
        )

    def test_that_overlap_or_go_beyond_the_image(self, check: Check) -> None:
        overlapping = patched(build(), SECTIONS + 40 + 12, "<I", PAGE)
        assert "begins at 0x1000 in memory, the one before it ends at 0x2000" in str(
            check(overlapping)
        )
        too_long = patched(build(), OPTIONAL_HEADER + 56, "<I", 2 * PAGE)
        assert "its sections end at 0x3000, but its size is given as 0x2000" in str(check(too_long))
        assert codes(check(overlapping)) == codes(check(too_long)) == [("error", "sections")]

    def test_with_a_gap_are_refused_by_windows(self, check: Check) -> None:
        gap = patched(build(), SECTIONS + 40 + 12, "<I", 5 * PAGE)
        gap = patched(gap, OPTIONAL_HEADER + 56, "<I", 6 * PAGE)
        assert codes(check(signed(gap))) == [("warning", "sections")]
        assert codes(check(signed(gap), "windows")) == [("error", "sections")]
        aligned = patched(gap, OPTIONAL_HEADER + 32, "<I", 4 * PAGE)
        assert codes(check(signed(aligned), "windows")) == []

    def test_that_are_not_aligned_to_pages_are_refused_by_wine(self, check: Check) -> None:
        image = signed(build(alignment=0x200))
        assert codes(check(image)) == [("error", "alignment")]
        assert codes(check(image, "windows")) == [("warning", "alignment")]
        close = signed(patched(build(alignment=0x200), SECTIONS + 40 + 12, "<I", PAGE + 0x200))
        assert codes(check(close, "windows")) == [("warning", "alignment")]

    def test_that_are_not_there(self, check: Check) -> None:
        assert "it has no sections" in only(check(patched(build(), 0x86, "<H", 0))).message

    def test_with_writable_code(self, check: Check) -> None:
        more = [
            Section(b"PAGE", b"\xc3", TEXT | WRITABLE),
            Section(b".data", b"x", DATA | WRITABLE),
        ]
        finding = only(check(build(text=TEXT | WRITABLE, sections=more)))
        assert (finding.severity, finding.code) == (Severity.WARNING, "writable-code")
        assert finding.message.startswith("x.sys: .text, PAGE can be written and executed")


class TestImports:
    @pytest.mark.parametrize(
        "module",
        [
            *(
                "KERNEL32.dll",
                "ntdll.dll",
                "msvcrt.dll",
                "VCRUNTIME140D.dll",
                "ucrtbase.dll",
                "bcrypt",
            ),
            *("api-ms-win-crt-heap-l1-1-0.dll", "bcryptprimitives.dll", "libgcc_s_seh-1.dll"),
        ],
    )
    def test_from_modules_of_programs_are_errors(self, check: Check, module: str) -> None:
        """On Wine, of those modules that this one does not have, or is not to be a program by."""
        image = signed(build(imports={"ntoskrnl.exe": ["DbgPrint"], module: ["f"]}))
        guests: tuple[Guest, ...] = (
            ("windows",) if module.startswith("api") else ("wine", "windows")
        )
        for guest in guests:
            finding = only(check(image, guest))
            assert (finding.severity, finding.code) == (Severity.ERROR, "user-mode")
            assert finding.message.startswith(f"x.sys: it imports {module}, which is for programs")
            assert "/NODEFAULTLIB" in finding.message

    @pytest.mark.parametrize("module", ["MSVCRT.dll", "user32", "api-ms-win-crt-heap-l1-1-0.dll"])
    def test_from_modules_of_programs_that_wine_loads_are_a_warning(
        self, check: Check, kernel: KernelExports, module: str
    ) -> None:
        for name in ("msvcrt.dll", "user32.dll"):
            (kernel.windows / "system32" / name).write_bytes(build_module(name, {"f": ""}))
        image = signed(build(imports={module: ["f"]}))
        finding = only(check(image))
        assert (finding.severity, finding.code) == (Severity.WARNING, "user-mode")
        assert finding.message.startswith(
            f"x.sys: it imports {module}, which is for programs: Wine loads it, Windows will refuse it"
        )
        assert codes(check(image, "windows")) == [("error", "user-mode")]

    def test_that_a_module_of_programs_lacks_are_named_too(
        self, check: Check, kernel: KernelExports
    ) -> None:
        module = build_module("msvcrt.dll", {"free": ""})
        (kernel.windows / "system32" / "msvcrt.dll").write_bytes(module)
        report = check(build(imports={"msvcrt.dll": ["free", "none"], "KERNEL32.dll": ["Sleep"]}))
        assert codes(report) == [
            ("error", "user-mode"),
            ("warning", "user-mode"),
            ("warning", "missing-import"),
        ]
        assert "it imports KERNEL32.dll, which is for programs: a kernel" in str(report)
        assert "it imports none, which msvcrt.dll of Wine 99 does not have" in str(report)

    @pytest.mark.parametrize("module", ["ntoskrnl.exe", "HAL.DLL", "ksecdd.sys", "BOOTVID.dll"])
    def test_from_modules_of_kernels_are_none(self, check: Check, module: str) -> None:
        assert not check(signed(build(imports={module: ["f"]})), "windows").findings

    def test_that_the_kernel_lacks_are_named(self, check: Check) -> None:
        lacking: list[str | int] = [
            "ExAllocatePool2",
            "ExToNowhere",
            "ExToNobody",
            "ExInACircle",
            99,
        ]
        report = check(build(imports={"NTOSKRNL.exe": ["DbgPrint", *lacking]}))
        assert codes(report) == [("warning", "ordinal"), ("warning", "missing-import")]
        assert (
            "it imports ExAllocatePool2, ExToNowhere, ExToNobody, ExInACircle, 99, which ntoskrnl.exe of "
            "Wine 99 does not have: calling it crashes the driver"
        ) in report.findings[1].message

    def test_that_windows_lacks_are_errors(self, kernel: KernelExports, tmp_path: Path) -> None:
        path = tmp_path / "x.sys"
        path.write_bytes(signed(build(imports={"ntoskrnl.exe": ["ExNew", "CcCopyRead"]})))
        report = preflight(path, kernel, guest="windows")
        assert codes(report) == [("error", "missing-import"), ("warning", "stub-import")]
        assert "ExNew, which ntoskrnl.exe of Wine 99 does not have: the load fails" in str(report)

    def test_that_are_stubs_are_named(self, check: Check) -> None:
        imports = {"ntoskrnl.exe": ["CcCopyRead", "ExForwarded", "ExForwardedStub", "DbgPrint"]}
        finding = only(check(build(imports=imports)))
        assert (finding.severity, finding.code) == (Severity.WARNING, "stub-import")
        assert finding.message == (
            "x.sys: it imports CcCopyRead, ExForwardedStub, which ntoskrnl.exe of Wine 99 has only as a "
            "stub: calling it crashes the driver"
        )

    def test_of_many_names_show_the_first(self, check: Check) -> None:
        finding = only(
            check(build(imports={"ntoskrnl.exe": [f"Ex{number}" for number in range(20)]}))
        )
        assert (
            "it imports Ex0, Ex1, Ex2, Ex3, Ex4, Ex5, Ex6, Ex7 and 12 more, which"
            in finding.message
        )

    def test_from_a_module_that_the_kernel_lacks_fail(self, check: Check) -> None:
        finding = only(check(build(imports={"WDFLDR.SYS": ["WdfVersionBind"]})))
        assert (finding.severity, finding.code) == (Severity.ERROR, "module")
        assert (
            "it imports WDFLDR.SYS (it is KMDF's loader), which Wine 99 does not have"
            in finding.message
        )

    def test_from_a_module_of_the_drivers_folder(self, check: Check) -> None:
        assert codes(check(build(imports={"ndis.SYS": ["NdisOpen"], "hal": ["KfForwarded"]}))) == []

    def test_from_a_module_that_is_damaged_are_not_checked(
        self, check: Check, kernel: KernelExports
    ) -> None:
        module = build_module("odd.sys", {"Odd": ""})
        odd = patched(module, DIRECTORIES, "<I", 0x900000)
        (kernel.windows / "system32" / "drivers" / "odd.sys").write_bytes(odd)
        finding = only(check(build(imports={"odd.sys": ["Odd"]})))
        assert (finding.severity, finding.code) == (Severity.WARNING, "module")
        assert "its imports of odd.sys were not checked: odd.sys: it refers to 0x900000" in str(
            finding
        )

    @pytest.mark.parametrize(
        "module", ["../../x.sys", "/etc/passwd", "..", "", "x" * 999, "a\\b.sys"]
    )
    def test_reach_no_other_folder(self, check: Check, module: str) -> None:
        assert codes(check(build(imports={module: ["f"]}))) == [("error", "module")]

    def test_that_can_t_be_read_are_an_error(self, check: Check) -> None:
        finding = only(
            check(patched(build(imports={"a.sys": []}), DIRECTORIES + 8, "<I", 0x900000))
        )
        assert (finding.severity, finding.code) == (Severity.ERROR, "imports")
        assert finding.message == ("x.sys: it refers to 0x900000, where nothing is: link it again")

    def test_that_are_delayed_are_a_warning(self, check: Check) -> None:
        descriptor = struct.pack("<IIIIIIII", 1, 3 * PAGE + 64, 0, 0, 0, 0, 0, 0) + bytes(32)
        section = Section(b".didat", descriptor + b"later.sys\0", DATA)
        image = patched(build(sections=[section]), DIRECTORIES + 13 * 8, "<II", 3 * PAGE, 64)
        finding = only(check(image))
        assert (finding.severity, finding.code) == (Severity.WARNING, "delay-load")
        assert "it loads later.sys when first called" in finding.message


class TestChecksum:
    @pytest.mark.parametrize("more", [b"", b"x", b"\xff" * 3, bytes(0x30001), b"\xff" * 0x20000])
    def test_is_what_pefile_computes(self, check: Check, more: bytes) -> None:
        image = build(imports={"ntoskrnl.exe": ["DbgPrint"]}) + more
        image = patched(image, CHECKSUM, "<I", pefile.PE(data=image).generate_checksum())
        assert [finding.code for finding in check(image, "windows").findings] == ["unsigned"]

    def test_that_is_wrong_is_refused_by_windows(self, check: Check) -> None:
        image = patched(signed(build()), CHECKSUM, "<I", 0x1234)
        assert codes(check(image)) == [("warning", "checksum")]
        finding = only(check(image, "windows"))
        assert finding.severity is Severity.ERROR
        assert "STATUS_IMAGE_CHECKSUM_MISMATCH" in finding.message

    def test_that_is_not_there_does_not_matter_to_wine(self, check: Check) -> None:
        assert codes(check(build())) == []
        assert codes(check(build(), "windows")) == [
            ("warning", "checksum"),
            ("error", "unsigned"),
        ]


class TestSignature:
    def test_is_wanted_by_windows_alone(self, check: Check) -> None:
        (_, finding) = check(build(), "windows").findings
        assert (finding.severity, finding.code) == (Severity.ERROR, "unsigned")
        for word in (
            "x.sys: it is not signed: Windows refuses it",
            f"{NTSTATUS(0xC0000428).name}, 0xC0000428",
            "577, ERROR_INVALID_IMAGE_HASH",
            "kdriver sign",
        ):
            assert word in finding.message
        assert codes(check(build())) == []

    @pytest.mark.parametrize("more", range(9))
    def test_is_of_a_file_of_any_length(self, check: Check, more: int) -> None:
        assert codes(check(signed(build() + b"x" * more), "windows")) == []

    def test_of_other_bytes_is_an_error_on_windows_alone(self, check: Check) -> None:
        image = signed(build())
        for at in (0x40, OPTIONAL_HEADER + 44, SECTIONS - 1, 0x210):
            changed = patched(image, at, "<B", image[at] ^ 1)
            changed = patched(changed, CHECKSUM, "<I", pefile.PE(data=changed).generate_checksum())
            finding = only(check(changed, "windows"))
            assert (finding.severity, finding.code) == (Severity.ERROR, "signature")
            assert "it was changed after it was signed. Windows refuses it" in finding.message
            assert codes(check(changed)) == []

    def test_covers_what_is_behind_it(self, check: Check) -> None:
        image = patched(signed(build()) + b"behind..", CHECKSUM, "<I", 0)
        assert ("error", "signature") in codes(check(image, "windows"))

    @pytest.mark.parametrize(
        ("offset", "size", "told"),
        [
            (0x10000, 8, "goes on behind the file's end"),
            (0xFFFFFFFF, 0xFFFFFFFF, "goes on behind the file's end"),
            (0x100, 8, "lies in its headers"),
            (0x400, 4, "its table has none"),
            (0x400, 8, "an entry of its table has 0 bytes"),
        ],
    )
    def test_in_a_place_that_can_t_be_is_an_error(
        self, check: Check, offset: int, size: int, told: str
    ) -> None:
        report = check(patched(build() + bytes(64), FIELD, "<II", offset, size), "windows")
        assert ("error", "signature") in codes(report)
        assert told in str(report)

    @pytest.mark.parametrize(
        ("signature", "told"),
        [
            (b"", "no element 0x30 where one is due"),
            (b"\x30", "an element without a length"),
            (b"\x30\x80\x00\x00", "an element without a length"),
            (b"\x30\x85\x01\x00\x00\x00\x00", "an element without a length"),
            (b"\x30\x84\xff\xff\xff\xff", "an element that does not fit in"),
            (b"\x30\x81\x01\x00", "a length in too many bytes"),
            (pkcs7(bytes(32)) + b"more than is due", "something is behind it"),
            (pkcs7(bytes(32)).replace(b"\x02\x01\x01", b"\x02\x01\x02", 1), "its version is not 1"),
            (
                pkcs7(bytes(32)).replace(b"\x37\x02\x01\x04", b"\x37\x02\x01\x05"),
                "is not Authenticode's",
            ),
            (
                pkcs7(bytes(32), CERTIFICATE[:-1] + b"\x01"),
                "a certificate without a signature",
            ),
            (pkcs7(bytes(32), CERTIFICATE * 65), "too many elements"),
            (pkcs7(b""), "it was changed after it was signed"),
        ],
    )
    def test_that_is_none_is_an_error(self, check: Check, signature: bytes, told: str) -> None:
        report = check(with_signature(build(), signature), "windows")
        assert ("error", "signature") in codes(report)
        assert told in str(report)

    def test_of_which_the_signer_signed_something_else_is_an_error(self, check: Check) -> None:
        digest = digest_of(build())
        forged = pkcs7(bytes(32)).replace(bytes(32), digest, 1)
        assert "its content is not what was signed" in str(
            check(with_signature(build(), forged), "windows")
        )

    def test_has_no_place_in_headers_that_end_before(self, check: Check) -> None:
        report = check(patched(build(), OPTIONAL_HEADER + 108, "<I", 4), "windows")
        assert ("error", "unsigned") in codes(report)


class TestKernelExports:
    def test_see_a_module_that_came_or_changed(self, kernel: KernelExports) -> None:
        path = kernel.windows / "system32" / "drivers" / "late.sys"
        for name in ("First", "AndSecond"):
            path.write_bytes(build_module("late.sys", {name: ""}) + name.encode())
            module = KernelExports(kernel.windows, "Wine 99").module("LATE.sys")
            assert module is not None
            assert module.look_up(name) is Availability.PRESENT
            assert module.look_up("Never") is Availability.MISSING

    def test_look_into_a_folder_once(
        self, kernel: KernelExports, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed: list[Path] = []
        really = os.listdir

        def listdir(path: Path) -> list[str]:
            listed.append(path)
            return really(path)

        monkeypatch.setattr(os, "listdir", listdir)
        for name in ("ntoskrnl.exe", "hal", "NDIS.sys", "none.sys"):
            kernel.module(name)
        assert listed == [kernel.windows / "system32", kernel.windows / "system32/drivers"]

    def test_of_a_folder_that_is_not_there_are_none(self, tmp_path: Path) -> None:
        assert KernelExports(tmp_path / "none", "none").module("ntoskrnl.exe") is None

    def test_take_no_data_for_a_stub(self, kernel: KernelExports) -> None:
        module = kernel.module("ntoskrnl.exe")
        assert module is not None
        assert not module.is_stub(0x900000)
        assert not module.is_stub(2 * PAGE - 1)
