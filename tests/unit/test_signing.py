"""Test signatures: the certificate that makes them, the copies that have them, and who is told of what."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pefile
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pytest_kdriver.cli import main
from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.authenticode import read_signature
from pytest_kdriver.image.cargo import Cargo
from pytest_kdriver.image.pe import Directory, read_image
from pytest_kdriver.image.preflight import preflight
from pytest_kdriver.image.signing import (
    NotSigned,
    SignatureError,
    SigningError,
    own_certificate,
    sign,
    signed_copy,
    verify,
)
from tests.pe_builder import OPTIONAL_HEADER, build, patched
from tests.signature_builder import FIELD, with_signature

ROOT = Path(__file__).resolve().parents[2]
CHECKSUM = OPTIONAL_HEADER + 64
MUTATIONS = 1000
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def state(shared_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a user who has a certificate, or will."""
    monkeypatch.setenv("XDG_STATE_HOME", str(shared_state))
    return shared_state


@pytest.fixture
def no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a user who has none, and which is not there yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "pytest-kdriver" / "signing"


@pytest.fixture(scope="module")
def hello() -> Path:
    return Cargo(ROOT / "drivers" / "Cargo.toml").build("hello")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x.sys"
    path.write_bytes(build(imports={"ntoskrnl.exe": ["DbgPrint"]}, pointers=2))
    return path


@pytest.fixture(scope="module")
def signify() -> SimpleNamespace:
    """Another reader of signatures.

    It needs oscrypto, whose last release, 1.3.0, takes OpenSSL 3.0.10 and later for none
    (wbond/oscrypto#78): it gets to see a version that it knows.
    """
    really = re.search

    def search(pattern: str, text: str, flags: int = 0) -> re.Match[str] | None:
        if pattern == r"\b(\d\.\d\.\d[a-z]*)\b":
            pattern = r"\b(\d\.\d\.\d+[a-z]*)\b"
        return really(pattern, text, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(re, "search", search)
        from signify.authenticode import AuthenticodeFile
        from signify.x509 import Certificate, CertificateStore
    return SimpleNamespace(
        AuthenticodeFile=AuthenticodeFile,
        Certificate=Certificate,
        CertificateStore=CertificateStore,
    )


def modes(folder: Path) -> dict[str, int]:
    found = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    return {".": folder.stat().st_mode & 0o777, **found}


def in_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path\n{code}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def generate(
    *,
    code: bool = True,
    begin: timedelta = timedelta(days=-2),
    end: timedelta = timedelta(days=2),
    name: str = "other",
) -> tuple[rsa.RSAPrivateKey, x509.Certificate]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begin)
        .not_valid_after(NOW + end)
    )
    if code:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        builder = builder.add_extension(usage, critical=True)
    return key, builder.sign(key, hashes.SHA256())


def save(folder: Path, key: rsa.RSAPrivateKey, certificate: x509.Certificate) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "key.pem").chmod(0o600)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "certificate.cer").write_bytes(pem)


def signed_by(
    image: Path, folder: Path, key: rsa.RSAPrivateKey, certificate: x509.Certificate
) -> Path:
    """A copy of ``image`` that osslsigncode signed, with a certificate that is not ours."""
    save(folder, key, certificate)
    output = folder / image.name
    subprocess.run(
        [
            *("osslsigncode", "sign", "-h", "sha256"),
            *("-certs", folder / "certificate.cer", "-key", folder / "key.pem"),
            *("-in", image, "-out", output),
        ],
        check=True,
        capture_output=True,
    )
    return output


class TestCertificate:
    def test_is_made_once_and_found_again(self, no_state: Path) -> None:
        first = own_certificate()
        before = {path: path.read_bytes() for path in no_state.iterdir()}
        assert own_certificate() == first
        assert {path: path.read_bytes() for path in no_state.iterdir()} == before
        assert first.key == no_state / "key.pem"

    def test_is_for_code_alone_and_for_ten_years(self) -> None:
        certificate = x509.load_pem_x509_certificate(own_certificate().path.read_bytes())
        key = certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 2048
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
        certificate.verify_directly_issued_by(certificate)
        extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert extended.critical
        assert list(extended.value) == [ExtendedKeyUsageOID.CODE_SIGNING]
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.digital_signature
        assert not usage.key_cert_sign
        assert not usage.key_encipherment
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        assert begin < datetime.now(UTC)
        assert timedelta(days=3650) < end - datetime.now(UTC) < timedelta(days=3653)

    def test_of_another_user_has_another_serial_and_key(
        self, state: Path, no_state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        another = x509.load_pem_x509_certificate(own_certificate().path.read_bytes())
        monkeypatch.setenv("XDG_STATE_HOME", str(state))
        own = x509.load_pem_x509_certificate(own_certificate().path.read_bytes())
        assert own.serial_number != another.serial_number
        assert own.public_key() != another.public_key()

    @pytest.mark.parametrize("umask", [0, 0o777])
    def test_has_a_key_that_nobody_else_can_read_from_the_first_byte(
        self, no_state: Path, monkeypatch: pytest.MonkeyPatch, umask: int
    ) -> None:
        no_state.parent.mkdir(parents=True)
        really, created = os.fchmod, []

        def fchmod(descriptor: int, mode: int) -> None:
            status = os.fstat(descriptor)
            created.append((status.st_mode & 0o177, status.st_size))
            really(descriptor, mode)

        monkeypatch.setattr(os, "fchmod", fchmod)
        before = os.umask(umask)
        try:
            own_certificate()
        finally:
            os.umask(before)
        assert created == [(0, 0), (0, 0)]
        assert modes(no_state)["."] & 0o077 == 0
        assert modes(no_state)["key.pem"] == 0o600

    def test_is_one_though_many_ask_for_it_at_once(self, no_state: Path) -> None:
        code = "from pytest_kdriver.image.signing import *; print(own_certificate().fingerprint)"
        processes = [in_python(code) for _ in range(4)]
        told = [process.communicate(timeout=60) for process in processes]
        assert {error for _, error in told} == {""}
        assert {output.strip() for output, _ in told} == {own_certificate().fingerprint}
        assert sorted(path.name for path in no_state.parent.iterdir()) == [
            "signing",
            "signing.lock",
        ]

    def test_is_not_what_a_killed_process_began(self, no_state: Path) -> None:
        left = no_state.with_name("signing.new-x")
        left.mkdir(parents=True)
        (left / "key.pem").write_text("half a key")
        own_certificate()
        assert not left.exists()

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (
                lambda folder: (folder / "key.pem").unlink(),
                "a part of the test certificate is lost",
            ),
            (
                lambda folder: (folder / "certificate.cer").unlink(),
                "a part of the test certificate is lost",
            ),
            (lambda folder: (folder / "key.pem").write_text(""), "is damaged"),
            (lambda folder: (folder / "key.pem").write_bytes(b"\0" * 99), "is damaged"),
            (lambda folder: (folder / "certificate.cer").write_text("x"), "is damaged"),
            (
                lambda folder: save(folder, generate()[0], generate()[1]),
                "is of another key than beside it",
            ),
            (lambda folder: (folder / "key.pem").chmod(0o640), "can be read by others: chmod 600"),
            (
                lambda folder: save(folder, *generate(end=timedelta(days=-1))),
                f"expired on {NOW - timedelta(days=1):%Y-%m-%d}",
            ),
        ],
    )
    def test_that_can_t_be_used_is_told_and_left(
        self, no_state: Path, damage: Callable[[Path], object], told: str
    ) -> None:
        own_certificate()
        damage(no_state)
        before = {path: path.read_bytes() for path in no_state.iterdir()}
        with pytest.raises(SigningError, match=re.escape(told)) as caught:
            own_certificate()
        assert f"remove {no_state}, and a new one is made" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in no_state.iterdir()} == before
        shutil.rmtree(no_state)
        own_certificate()

    @pytest.mark.parametrize(
        "name", ["", "ü\n/../$(reboot)", "a" * 300, "CN=x,O=Microsoft", "\\\"';", "\udcff"]
    )
    def test_is_named_after_whoever_has_it_whatever_the_name(
        self, no_state: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr("getpass.getuser", lambda: name)
        monkeypatch.setattr("socket.gethostname", lambda: name)
        subject = own_certificate().subject
        assert re.fullmatch(
            r"CN=pytest-kdriver test signing \([A-Za-z0-9._-]{1,16}@[A-Za-z0-9._-]{1,16}\)", subject
        )

    def test_of_a_user_without_a_name_has_its_number(
        self, no_state: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def nobody() -> str:
            raise KeyError

        monkeypatch.setattr("getpass.getuser", nobody)
        assert f"({os.getuid()}@" in own_certificate().subject

    def test_that_can_t_be_written_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        with pytest.raises(SigningError, match="can't be had"):
            own_certificate()

    def test_needs_a_package_that_is_named_where_it_is_not(self, image: Path) -> None:
        code = (
            "import sys; sys.modules['cryptography'] = None\n"
            "from pytest_kdriver.image.signing import *\n"
            "from pytest_kdriver.image.preflight import preflight\n"
            f"print(preflight(Path({str(image)!r}), None, guest='windows').errors[0].code)\n"
            "try: own_certificate()\n"
            "except SigningError as error: print(error)"
        )
        output, error = in_python(code).communicate(timeout=60)
        assert error == ""
        assert output == (
            "unsigned\nsignatures need the Python package cryptography: "
            "pip install 'pytest-kdriver[signing]'\n"
        )


class TestSign:
    @pytest.mark.parametrize("page_hashes", [False, True])
    def test_makes_what_three_readers_take_for_signed(
        self, hello: Path, tmp_path: Path, signify: SimpleNamespace, page_hashes: bool
    ) -> None:
        output = tmp_path / "hello.sys"
        sign(hello, output, page_hashes=page_hashes)
        certificate = own_certificate()
        told = subprocess.run(
            ["osslsigncode", "verify", "-CAfile", certificate.path, output],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "Signature verification: ok" in told
        assert ("Page hash" in told) == page_hashes
        der = x509.load_pem_x509_certificate(certificate.path.read_bytes()).public_bytes(
            serialization.Encoding.DER
        )
        trusted = [signify.Certificate.from_der(der)]
        with output.open("rb") as file:
            signed = signify.AuthenticodeFile.from_stream(file)
            signed.verify(
                trusted_certificate_store=signify.CertificateStore(trusted, trusted=True),
                verify_additional_hashes=True,
            )
        signature = verify(output)
        assert signature.subject == certificate.subject
        assert signature.fingerprint == certificate.fingerprint
        assert signature.digest_algorithm == "sha256"
        assert signature.page_hashes == page_hashes
        assert preflight(output, None, guest="windows").findings == ()

    @pytest.mark.parametrize("more", range(9))
    def test_makes_a_right_checksum(self, image: Path, tmp_path: Path, more: int) -> None:
        image.write_bytes(image.read_bytes() + b"x" * more)
        sign(image, tmp_path / "signed.sys")
        pe = pefile.PE(tmp_path / "signed.sys")
        assert pe.OPTIONAL_HEADER.CheckSum == pe.generate_checksum() != 0

    def test_leaves_the_original_as_it_was(self, image: Path, tmp_path: Path) -> None:
        image.chmod(0o640)
        os.utime(image, ns=(10**18, 10**18))
        content, before = image.read_bytes(), image.stat()
        sign(image, tmp_path / "signed.sys")
        after = image.stat()
        assert image.read_bytes() == content
        assert (after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
            before.st_mtime_ns,
            before.st_ctime_ns,
            before.st_ino,
        )
        assert (tmp_path / "signed.sys").stat().st_mode == stat.S_IFREG | 0o640
        with pytest.raises(SigningError, match="would be overwritten"):
            sign(image, tmp_path / "." / image.name)
        (tmp_path / "link.sys").hardlink_to(image)
        with pytest.raises(SigningError, match="would be overwritten"):
            sign(image, tmp_path / "link.sys")
        assert image.read_bytes() == content

    def test_replaces_a_signature(self, image: Path, tmp_path: Path) -> None:
        theirs = signed_by(image, tmp_path / "theirs", *generate())
        assert verify(theirs).subject == "CN=other"
        again, directly = tmp_path / "again.sys", tmp_path / "directly.sys"
        sign(theirs, again)
        sign(image, directly)
        assert verify(again) == verify(directly)
        assert again.stat().st_size == directly.stat().st_size
        assert len(read_signature(read_image(again)).certificates) == 1

    def test_replaces_a_signature_that_is_damaged(self, image: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.sys"
        broken.write_bytes(with_signature(image.read_bytes(), b"\x30\x80nonsense"))
        sign(broken, tmp_path / "signed.sys")
        verify(tmp_path / "signed.sys")

    def test_does_not_cut_off_what_it_does_not_know(self, image: Path, tmp_path: Path) -> None:
        image.write_bytes(with_signature(image.read_bytes()) + b"something")
        with pytest.raises(ImageError, match="something behind its signature"):
            sign(image, tmp_path / "signed.sys")

    def test_replaces_a_file_in_one_step(self, image: Path, tmp_path: Path) -> None:
        output = tmp_path / "signed.sys"
        output.write_text("old")
        with output.open() as old:
            sign(image, output)
            assert old.read() == "old"
        verify(output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["signed.sys", "x.sys"]

    @pytest.mark.parametrize("name", ["-in.sys", "a b.sys", "a\nb.sys", "ü" * 120 + ".sys", ".x"])
    def test_takes_names_as_they_come(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        image.rename(tmp_path / name)
        (tmp_path / "-o").mkdir()
        sign(Path(name), Path("-o", name))
        verify(Path("-o", name))

    def test_of_no_image_says_what_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "x.sys").write_bytes(b"\x7fELF")
        with pytest.raises(ImageError, match="it is an ELF file"):
            sign(tmp_path / "x.sys", tmp_path / "y.sys")
        with pytest.raises(ImageError, match="there is no"):
            sign(tmp_path / "none.sys", tmp_path / "y.sys")

    def test_needs_a_program_that_is_named_where_it_is_not(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SigningError, match="apt-get install osslsigncode"):
            sign(image, tmp_path / "y.sys")

    @pytest.mark.parametrize(
        ("script", "told"),
        [
            ("echo no such thing; echo at all >&2; exit 3", "exit code 3: at all; no such thing"),
            ("kill -SEGV $$", "signal 11"),
            ("exit 0", "is not whole"),
            ("cp unsigned signed", "is not whole"),
        ],
    )
    def test_leaves_nothing_where_the_program_fails(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
    ) -> None:
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "osslsigncode").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "osslsigncode").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs), prepend=":")
        with pytest.raises(SigningError, match=told):
            sign(image, tmp_path / "y.sys")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "x.sys"]

    def test_leaves_nothing_where_its_folder_is_not(self, image: Path, tmp_path: Path) -> None:
        with pytest.raises(SigningError, match="y.sys can't be written: No such file"):
            sign(image, tmp_path / "none" / "y.sys")
        (tmp_path / "folder").mkdir()
        with pytest.raises(SigningError, match="folder can't be written: Is a directory"):
            sign(image, tmp_path / "folder")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.sys"]

    @pytest.mark.parametrize("room", [100, 2048, 3000])
    def test_leaves_nothing_where_a_file_may_not_be_so_large(
        self, image: Path, tmp_path: Path, room: int
    ) -> None:
        own_certificate()
        code = (
            "import resource\n"
            "from pytest_kdriver.image.signing import *\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
            f"try: sign(Path({str(image)!r}), Path({str(tmp_path / 'y.sys')!r}))\n"
            "except SigningError as error: print(error)"
        )
        output, error = in_python(code, PYTHONDONTWRITEBYTECODE="1").communicate(timeout=60)
        assert error == ""
        assert output.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.sys"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="root alone can mount a small disk")
    @pytest.mark.parametrize("free", [0, 1, 2])
    def test_leaves_nothing_on_a_full_disk(self, image: Path, tmp_path: Path, free: int) -> None:
        disk, output = tmp_path / "disk", tmp_path / "disk" / "y.sys"
        disk.mkdir()
        size = f"size={4096 * (1 + free)}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False, capture_output=True
        )
        if mounted.returncode:
            pytest.skip("no disk can be mounted here")
        try:
            output.write_text("old")
            if free == 2:
                sign(image, output)
                verify(output)
            else:
                with pytest.raises(
                    SigningError, match=r"^.*[xy]\.sys can't be (written|signed): .*$"
                ):
                    sign(image, output)
                assert output.read_text() == "old"
            assert [path.name for path in disk.iterdir()] == ["y.sys"]
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_by_many_at_once_gives_one_whole_file(self, image: Path, tmp_path: Path) -> None:
        own_certificate()
        output = tmp_path / "y.sys"
        code = (
            "from pytest_kdriver.image.signing import *\n"
            f"for _ in range(5): sign(Path({str(image)!r}), Path({str(output)!r}))"
        )
        processes = [in_python(code) for _ in range(2)]
        while any(process.poll() is None for process in processes):
            if output.exists():
                verify(output)
        assert [process.communicate()[1] for process in processes] == ["", ""]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.sys", "y.sys"]

    def test_tells_the_key_to_nobody(
        self,
        image: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        certificate = own_certificate()
        programs = tmp_path / "bin"
        programs.mkdir()
        really = shutil.which("osslsigncode")
        (programs / "osslsigncode").write_text(
            f"#!/bin/sh\ncat /proc/$$/cmdline /proc/$$/environ >{tmp_path}/seen\n"
            f'exec {really} "$@"\n'
        )
        (programs / "osslsigncode").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs), prepend=":")
        output = tmp_path / "y.sys"
        assert main(["sign", str(image), "-o", str(output)]) == 0
        assert main(["sign", "--certificate"]) == 0
        assert main(["verify", str(output), str(image)]) == 1
        captured = capfd.readouterr()
        seen = (tmp_path / "seen").read_bytes()
        assert str(certificate.key).encode() in seen
        key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        numbers = key.private_numbers()
        secrets = [number.to_bytes(256, "big").lstrip(b"\0") for number in (numbers.d, numbers.p)]
        secrets += certificate.key.read_bytes().splitlines()[1:-1]
        everything = seen + output.read_bytes() + certificate.path.read_bytes()
        everything += (captured.out + captured.err + repr(certificate)).encode()
        for secret in secrets:
            assert secret not in everything


class TestVerify:
    def test_of_an_unsigned_file_speaks_as_windows_does(self, image: Path) -> None:
        with pytest.raises(NotSigned) as caught:
            verify(image)
        assert str(caught.value) == (
            "x.sys: it is not signed: Windows refuses it (STATUS_INVALID_IMAGE_HASH, 0xC0000428; its "
            "service manager says 577, ERROR_INVALID_IMAGE_HASH)"
        )

    def test_refuses_a_thousand_changed_copies(self, hello: Path, tmp_path: Path) -> None:
        """Each with up to four bytes that are others, half of them in the image, half in the signature."""
        path = tmp_path / "hello.sys"
        sign(hello, path)
        image = read_image(path)
        table, _ = image.directory(Directory.SECURITY)
        field = image.checksum_offset + 80
        covered = [
            *range(image.checksum_offset),
            *range(image.checksum_offset + 4, field),
            *range(field + 8, table),
        ]
        signature = range(table + 8, len(image.data.rstrip(b"\0")))
        random_ = random.Random(9)
        for number in range(MUTATIONS):
            changed = bytearray(image.data)
            for at in random_.sample(covered if number % 2 else signature, random_.randint(1, 4)):
                changed[at] ^= random_.randint(1, 255)
            path.write_bytes(changed)
            with pytest.raises(ImageError):
                verify(path)
            if number % 2:
                try:
                    found = {
                        finding.code for finding in preflight(path, None, guest="windows").errors
                    }
                except ImageError:
                    continue
                assert found & {"signature", "unsigned"}

    @pytest.mark.parametrize("page_hashes", [False, True])
    def test_looks_at_each_byte_of_a_signature(
        self, image: Path, tmp_path: Path, page_hashes: bool
    ) -> None:
        path = tmp_path / "signed.sys"
        sign(image, path, page_hashes=page_hashes)
        content = path.read_bytes()
        table, _ = read_image(path).directory(Directory.SECURITY)
        for at in range(table + 8, len(content)):
            path.write_bytes(patched(content, at, "<B", content[at] ^ 1 << at % 8))
            with pytest.raises(SignatureError):
                verify(path)

    def test_refuses_the_signature_of_another_image(self, image: Path, tmp_path: Path) -> None:
        sign(image, tmp_path / "signed.sys")
        signed = read_image(tmp_path / "signed.sys")
        table, size = signed.directory(Directory.SECURITY)
        other = build(imports={"ntoskrnl.exe": ["KeBugCheckEx"]}, pointers=2)
        assert len(other) == table
        image.write_bytes(patched(other, FIELD, "<II", table, size) + signed.data[table:])
        with pytest.raises(SignatureError, match="it was changed after it was signed"):
            verify(image)

    def test_does_not_mind_a_checksum(self, image: Path, tmp_path: Path) -> None:
        """It is no part of what is signed."""
        sign(image, tmp_path / "signed.sys")
        image.write_bytes(patched((tmp_path / "signed.sys").read_bytes(), CHECKSUM, "<I", 7))
        verify(image)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"code": False}, "its signer's certificate is not for code"),
            ({"end": timedelta(days=-1)}, "its signer's certificate is valid from"),
            ({"begin": timedelta(days=1)}, "its signer's certificate is valid from"),
        ],
    )
    def test_wants_a_certificate_that_is_valid_for_code(
        self, image: Path, tmp_path: Path, options: dict[str, bool], told: str
    ) -> None:
        key, certificate = generate(**options)  # type: ignore[arg-type]
        signed = signed_by(image, tmp_path / "theirs", key, certificate)
        with pytest.raises(SignatureError, match=told):
            verify(signed)

    def test_shows_a_name_in_characters_that_can_be_shown(
        self, image: Path, tmp_path: Path
    ) -> None:
        signed = signed_by(image, tmp_path / "theirs", *generate(name="\x1b[2Jü\u202e"))
        assert verify(signed).subject == "CN=\\x1b[2J\\xfc\\u202e"


class TestSignedCopy:
    def test_is_made_once_under_its_own_name(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = signed_copy(image, tmp_path / "cache")
        assert copy.name == "x.sys"
        assert copy.is_relative_to(tmp_path / "cache")
        verify(copy)
        before = copy.stat()
        os.utime(image)
        monkeypatch.setenv("PATH", "")  # nothing can be signed
        assert signed_copy(image, tmp_path / "cache") == copy
        assert copy.stat().st_mtime_ns == before.st_mtime_ns

    def test_of_another_image_or_certificate_is_another(
        self, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        copies = {signed_copy(image, cache)}
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        copies.add(signed_copy(image, cache))
        image.write_bytes(build())
        copies.add(signed_copy(image, cache))
        assert len(copies) == 3
        for copy in copies:
            verify(copy)

    def test_that_is_broken_is_made_anew(self, image: Path, tmp_path: Path) -> None:
        copy = signed_copy(image, tmp_path / "cache")
        content = copy.read_bytes()
        copy.write_bytes(content[:-1])
        assert signed_copy(image, tmp_path / "cache") == copy
        verify(copy)


class TestCommand:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        shutil.copy(image, tmp_path / "other")
        return tmp_path

    def test_signs_beside_the_file_and_says_where(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sign", "x.sys", "other/x.sys"]) == 0
        assert capsys.readouterr().out == "x.signed.sys\nother/x.signed.sys\n"
        assert main(["verify", "x.signed.sys", "other/x.signed.sys"]) == 0
        certificate = own_certificate()
        told = (
            f"signed by {certificate.subject}, certificate {certificate.fingerprint}, by sha256\n"
        )
        assert capsys.readouterr().out == f"x.signed.sys: {told}other/x.signed.sys: {told}"

    def test_signs_where_it_is_told_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sign", "x.sys", "-o", "y.sys", "--page-hashes"]) == 0
        assert main(["sign", "x.sys", "-o", "other"]) == 0
        assert capsys.readouterr().out == "y.sys\nother/x.sys\n"
        assert main(["verify", "y.sys"]) == 0
        assert capsys.readouterr().out.endswith(", by sha256, with page hashes\n")

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ([], "nothing to sign"),
            (["x.sys", "x.sys"], "would be the copy of 2 files"),
            (["x.sys", "other/x.sys", "-o", "y.sys"], "y.sys is no folder"),
            (["x.sys", "other/x.sys", "-o", "other"], "would be the copy of 2 files"),
            (["x.sys", "-o", "x.sys"], "x.sys would be overwritten by its copy"),
            (["x.sys", "-o", "."], "x.sys would be overwritten by its copy"),
        ],
    )
    def test_with_a_wrong_call_signs_nothing_and_exits_with_2(
        self, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
    ) -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert main(["sign", *arguments]) == 2
        assert told in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    def test_of_what_can_t_be_signed_exits_with_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("text.sys").write_text("hello")
        assert main(["sign", "text.sys"]) == 1
        assert main(["sign", "none.sys"]) == 1
        error = capsys.readouterr().err
        assert error == (
            "kdriver: text.sys is no Windows image: it is text\nkdriver: there is no none.sys\n"
        )

    def test_verifies_all_and_exits_with_1_for_one(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["sign", "x.sys"])
        capsys.readouterr()
        assert main(["verify", "x.sys", "none.sys", "x.signed.sys"]) == 1
        captured = capsys.readouterr()
        assert captured.out.startswith("x.signed.sys: signed by CN=pytest-kdriver")
        assert captured.err.startswith(
            "kdriver: x.sys: it is not signed: Windows refuses it (STATUS"
        )
        assert captured.err.endswith("kdriver: there is no none.sys\n")

    def test_tells_how_windows_is_to_trust_the_certificate(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["sign", "--certificate"]) == 0
        told = capsys.readouterr().out
        certificate = own_certificate()
        for line in (
            f"certificate  {certificate.path}",
            f"valid until  {certificate.valid_until:%Y-%m-%d}",
            "    bcdedit /set testsigning on",
            "    certutil -addstore Root certificate.cer",
            "    certutil -addstore TrustedPublisher certificate.cer",
        ):
            assert line in told.splitlines()
        assert "not verified on Windows" in told
