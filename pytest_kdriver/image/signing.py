"""Test signatures: a certificate of the user's own, images signed with it, and what a signature is worth.

What is signed is a copy; the file that the linker made stays as it is. ``osslsigncode`` signs, in a
process of its own; reading what it wrote is the work of ``authenticode`` and of ``cryptography``, so
that the one vouches for the other. ``cryptography`` comes with the extra ``signing``.

Whose certificate it is, or whether anybody trusts it, is not judged here: with test-signing on, Windows
takes any.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from filelock import FileLock

from pytest_kdriver.errors import ImageError, KdriverError
from pytest_kdriver.image.authenticode import (
    REFUSED,
    NotSigned,
    SignatureError,
    SignedData,
    read_signature,
    without_signature,
)
from pytest_kdriver.image.pe import Image, read_image
from pytest_kdriver.image.preflight import checksum
from pytest_kdriver.paths import state_directory

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__all__ = [
    "Certificate",
    "NotSigned",
    "Signature",
    "SignatureError",
    "SigningError",
    "own_certificate",
    "sign",
    "signed_copy",
    "verify",
]

LIFETIME: Final = timedelta(days=3652)
"""Of a certificate: ten years."""
_SLACK: Final = timedelta(days=1)
"""How much earlier it begins: a guest's clock may be behind."""
_KEY_BITS: Final = 2048
_NAME: Final = "pytest-kdriver test signing"
_USER: Final = 16
_HOST: Final = 16
"""Characters of the two in its name, which X.509 allows 64."""
_TIMEOUT: Final = 120.0
"""Seconds that osslsigncode gets; 10 MB take it some tenths."""

_KEY: Final = "key.pem"
_CERTIFICATE: Final = "certificate.cer"


class SigningError(KdriverError):
    """A signature, or the certificate for it, that can't be made: the message says what mends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The user's test certificate: two files in PEM, its name, its SHA-256 in hex, how long it is valid."""

    key: Path
    path: Path
    subject: str
    fingerprint: str
    valid_until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signature that fits its image.

    ``subject`` is the signer's name, ``fingerprint`` the SHA-256 of its certificate in hex,
    ``digest_algorithm`` hashlib's name for what the image's digest is by.
    """

    subject: str
    fingerprint: str
    digest_algorithm: str
    page_hashes: bool


def own_certificate() -> Certificate:
    """The user's certificate for tests, made at the first call; one, however many processes ask.

    Raises ``SigningError`` where there is one that can't be used; it is never replaced.
    """
    _require_cryptography()
    folder = state_directory() / "signing"
    try:
        if not _is_there(folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not _is_there(folder):
                    _make(folder)
        return _load(folder)
    except OSError as error:
        raise SigningError(f"the test certificate in {folder} can't be had: {error}") from error


def sign(image: Path, output: Path, *, page_hashes: bool = False) -> None:
    """Write a signed copy of ``image`` to ``output``, with the file mode of ``image``.

    A signature that is there already is replaced, as is a file ``output``, in one step. ``page_hashes``
    adds a digest of each page. Raises ``ImageError`` for what is no image, ``SigningError`` for the rest.
    """
    content = read_image(image)
    if output.exists() and output.samefile(image):
        raise SigningError(f"{image} would be overwritten by its signed copy: name another output")
    _sign(content, output, own_certificate(), page_hashes=page_hashes)


def signed_copy(image: Path, cache: Path) -> Path:
    """A signed copy of ``image`` in the folder ``cache``, under its own name; made once.

    It is found again by the SHA-256 of the image and of the certificate. Raises as ``sign`` does.
    """
    content = read_image(image)
    certificate = own_certificate()
    key = hashlib.sha256(content.data + bytes.fromhex(certificate.fingerprint)).hexdigest()
    copy = cache / key[:32] / image.name
    if not _is_whole(copy):
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SigningError(f"{copy.parent} can't be made: {error}") from error
        _sign(content, copy, certificate, page_hashes=False)
    return copy


def verify(image: Path) -> Signature:
    """The signature of ``image``, which fits it, made by the key of a valid certificate for code.

    Raises ``NotSigned``, ``SignatureError`` for one that does not fit, and ``ImageError`` for no image.
    """
    _require_cryptography()
    found = read_image(image)
    signed = read_signature(found)
    try:
        certificates = _certificates(signed)
        with _certificate_read():
            certificate = _signer(signed, certificates)
            _check_signer(signed, certificate)
            subject = _printable(certificate.subject.rfc4514_string())
    except _Unfit as error:
        raise SignatureError(
            f"{found.path.name}: its signature is not valid, {error}: {REFUSED}"
        ) from None
    return Signature(
        subject=subject,
        fingerprint=_fingerprint(certificate),
        digest_algorithm=signed.algorithm,
        page_hashes=signed.page_hashes,
    )


# --- the certificate --------------------------------------------------------------------------------


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise SigningError(
            "signatures need the Python package cryptography: pip install 'pytest-kdriver[signing]'"
        ) from error


def _is_there(folder: Path) -> bool:
    """Whether there is anything of a certificate; a part of one is not to be replaced either."""
    return (folder / _KEY).exists() or (folder / _CERTIFICATE).exists()


def _make(folder: Path) -> None:
    """Make the folder with a new certificate in it; it is there as a whole, or not at all."""
    from cryptography.hazmat.primitives import serialization

    for left in folder.parent.glob(f"{folder.name}.new-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))
    try:
        key, certificate = _generate()
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        _write(new / _KEY, private, 0o600)
        _write(new / _CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that nobody else could read meanwhile."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 -- a descriptor
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _generate() -> tuple[RSAPrivateKey, x509.Certificate]:
    """A key, and a certificate that it signed for itself, as Windows' tools make one for code."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _common_name())])
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        (
            *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _common_name() -> str:
    """Whose certificate it is, in characters that mean nothing to any shell or to X.500."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        user = str(os.getuid())
    user, host = (
        re.sub(r"[^A-Za-z0-9._-]", "_", name, flags=re.ASCII)[:most] or "unknown"
        for name, most in ((user, _USER), (socket.gethostname(), _HOST))
    )
    return f"{_NAME} ({user}@{host})"


def _load(folder: Path) -> Certificate:
    """The certificate in ``folder``. Raises ``SigningError`` where it can't be used."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    key_path, path = folder / _KEY, folder / _CERTIFICATE
    anew = f"remove {folder}, and a new one is made; a Windows that trusted the old one has to be told again"
    try:
        if key_path.stat().st_mode & 0o077:
            raise SigningError(
                f"the key of the test certificate can be read by others: chmod 600 {key_path}; or, since "
                f"they may have it, {anew}"
            )
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        fits = key.public_key() == certificate.public_key()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SigningError(
            f"a part of the test certificate is lost, {error.filename}: {anew}"
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # whose messages may quote what they read
        raise SigningError(f"the test certificate in {folder} is damaged: {anew}") from None
    if not fits:
        raise SigningError(
            f"the test certificate in {folder} is of another key than beside it: {anew}"
        )
    valid_until = certificate.not_valid_after_utc
    if valid_until < datetime.now(UTC):
        raise SigningError(
            f"the test certificate in {folder} expired on {valid_until:%Y-%m-%d}: {anew}"
        )
    return Certificate(
        key=key_path,
        path=path,
        subject=certificate.subject.rfc4514_string(),
        fingerprint=_fingerprint(certificate),
        valid_until=valid_until,
    )


def _fingerprint(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import hashes

    return certificate.fingerprint(hashes.SHA256()).hex()


# --- signing ----------------------------------------------------------------------------------------


def _sign(image: Image, output: Path, certificate: Certificate, *, page_hashes: bool) -> None:
    """Sign what was read of ``image``, whatever becomes of its file meanwhile."""
    program = shutil.which("osslsigncode")
    if program is None:
        raise SigningError("there is no osslsigncode, which signs: apt-get install osslsigncode")
    unsigned = without_signature(image)
    try:
        with _room_beside(output) as room:
            (room / "unsigned").write_bytes(unsigned)
            _run(
                program,
                *("sign", "-h", "sha256", *(["-ph"] if page_hashes else [])),
                *("-certs", str(certificate.path), "-key", str(certificate.key)),
                *("-in", "unsigned", "-out", "signed"),
                room=room,
                image=image,
            )
            signed = room / "signed"
            if not _is_whole(signed):
                raise SigningError(
                    f"{image.path} can't be signed: what osslsigncode wrote is not whole"
                )
            signed.chmod(image.path.stat().st_mode & 0o777)
            signed.replace(output)
    except OSError as error:
        raise SigningError(f"{output} can't be written: {error.strerror or error}") from error


@contextmanager
def _room_beside(output: Path) -> Iterator[Path]:
    """A folder of nobody else's in the folder of ``output``, so that a file in there can take its place."""
    room = Path(tempfile.mkdtemp(prefix=".kdriver-sign-", dir=output.absolute().parent))
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _run(program: str, *arguments: str, room: Path, image: Image) -> None:
    try:
        done = subprocess.run(
            [program, *arguments],
            cwd=room,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise SigningError(
            f"{image.path} can't be signed: osslsigncode was not done after {_TIMEOUT:.0f} s"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines()]
        told = "; ".join(filter(None, lines)) or "it says nothing"
        what = (
            f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        )
        raise SigningError(f"{image.path} can't be signed: osslsigncode, {what}: {told}")


def _is_whole(signed: Path) -> bool:
    """Whether there is an image with a signature that fits it, and the right checksum."""
    try:
        image = read_image(signed)
        read_signature(image)
    except ImageError:
        return False
    return image.checksum == checksum(image.data, image.checksum_offset)


# --- verifying --------------------------------------------------------------------------------------


class _Unfit(Exception):
    """Why a signature is not what it says, after a comma."""


@contextmanager
def _certificate_read() -> Iterator[None]:
    """Read a certificate that nobody vouches for: ``_Unfit`` where cryptography can't."""
    from cryptography.exceptions import InvalidSignature

    try:
        with warnings.catch_warnings(action="ignore"):  # of what is odd in it
            yield
    except _Unfit:
        raise
    except InvalidSignature:
        raise _Unfit("it was not made by the key of its certificate") from None
    except Exception as error:  # ValueError, InvalidVersion, DuplicateExtension, and some more
        raise _Unfit("its signer's certificate is damaged") from error


def _certificates(signed: SignedData) -> list[x509.Certificate]:
    """Those that came with the signature; what is none is left out."""
    from cryptography import x509

    found = []
    for encoded in signed.certificates:
        with suppress(_Unfit), _certificate_read():
            certificate = x509.load_der_x509_certificate(encoded)
            certificate.subject, certificate.issuer  # noqa: B018 -- read now, or fail later
            found.append(certificate)
    return found


def _signer(signed: SignedData, certificates: Sequence[x509.Certificate]) -> x509.Certificate:
    """The certificate of the signer, vouched for by another that came along, or by itself."""
    wanted = signed.signer
    for certificate in certificates:
        if (certificate.issuer.public_bytes(), certificate.serial_number) == (
            wanted.issuer,
            wanted.serial,
        ):
            break
    else:
        raise _Unfit("its signer's certificate is not in it, or damaged")
    issuers = [issuer for issuer in certificates if issuer.subject == certificate.issuer]
    if not issuers:
        raise _Unfit("the certificate that its signer's is by is not in it")
    certificate.verify_directly_issued_by(issuers[0])
    return certificate


def _check_signer(signed: SignedData, certificate: x509.Certificate) -> None:
    """See that ``certificate`` is good for code, and that its key made the signature."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID

    algorithms: dict[str, type[hashes.SHA1 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
        "sha1": hashes.SHA1,
        "sha256": hashes.SHA256,
        "sha384": hashes.SHA384,
        "sha512": hashes.SHA512,
    }
    key = certificate.public_key()
    if not signed.signer.is_rsa or not isinstance(key, rsa.RSAPublicKey):
        raise _Unfit("it is not by RSA")
    key.verify(
        signed.signer.signature,
        signed.signer.attributes,
        padding.PKCS1v15(),
        algorithms[signed.algorithm](),
    )
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = x509.ExtendedKeyUsage([])
    if ExtendedKeyUsageOID.CODE_SIGNING not in usage:
        raise _Unfit("its signer's certificate is not for code")
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= datetime.now(UTC) <= end and not signed.signer.has_timestamp:
        raise _Unfit(f"its signer's certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}")


def _printable(name: str) -> str:
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
