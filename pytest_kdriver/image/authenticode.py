"""Authenticode: what of an image a signature is about, and what the signature in it says.

A reader alone, made for files that nobody vouches for: what it can't make sense of is a
``SignatureError``, and time and memory are bounded by the file's size. It compares digests; whether a
key made the signature is for ``signing``, which has one for it. Layouts are those of Microsoft's
"Windows Authenticode Portable Executable Signature Format" and "PE Format", PKCS #7 (RFC 2315) and DER.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pytest_kdriver.errors import ImageError
from pytest_kdriver.image.pe import Directory, Image

REFUSED: Final = (
    "Windows refuses it (STATUS_INVALID_IMAGE_HASH, 0xC0000428; its service manager says 577, "
    "ERROR_INVALID_IMAGE_HASH)"
)
"""What becomes of an image without a signature that fits. Not verified on Windows."""

MAX_ELEMENTS: Final = 64
"""How many entries of a table, certificates or attributes there may be; three are usual."""

_ALIGNMENT: Final = 8
"""Where a table of certificates, and each entry in it, begins; in bytes."""
_ENTRY: Final = struct.Struct("<IHH")
"""WIN_CERTIFICATE's head: its length with that, a revision, a type."""
_REVISION_2: Final = 0x0200
_PKCS_SIGNED_DATA: Final = 2

_SIGNED_DATA: Final = bytes.fromhex("2a864886f70d010702")  # 1.2.840.113549.1.7.2
_INDIRECT_DATA: Final = bytes.fromhex("2b060104018237020104")  # 1.3.6.1.4.1.311.2.1.4
_CONTENT_TYPE: Final = bytes.fromhex("2a864886f70d010903")  # 1.2.840.113549.1.9.3
_MESSAGE_DIGEST: Final = bytes.fromhex("2a864886f70d010904")  # 1.2.840.113549.1.9.4
_RSA: Final = {
    bytes.fromhex("2a864886f70d010101"),  # 1.2.840.113549.1.1.1
    bytes.fromhex("2a864886f70d01010b"),  # 1.2.840.113549.1.1.11, with SHA-256
    bytes.fromhex("2a864886f70d01010c"),
    bytes.fromhex("2a864886f70d01010d"),
}
_PAGE_HASHES: Final = (
    bytes.fromhex("060a2b060104018237020301"),  # 1.3.6.1.4.1.311.2.3.1, by SHA-1
    bytes.fromhex("060a2b060104018237020302"),  # 1.3.6.1.4.1.311.2.3.2, by SHA-256
)
_ALGORITHMS: Final = {
    bytes.fromhex("2b0e03021a"): "sha1",  # 1.3.14.3.2.26
    bytes.fromhex("608648016503040201"): "sha256",  # 2.16.840.1.101.3.4.2.1
    bytes.fromhex("608648016503040202"): "sha384",
    bytes.fromhex("608648016503040203"): "sha512",
}

_INTEGER: Final = 0x02
_BITS: Final = 0x03
_OCTETS: Final = 0x04
_NULL: Final = 0x05
_OBJECT: Final = 0x06
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_FIRST: Final = 0xA0
"""[0], constructed."""
_SECOND: Final = 0xA1


class SignatureError(ImageError):
    """An image's signature that can't be read, or is not of that image."""


class NotSigned(SignatureError):
    """An image without a signature in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Who signed: a certificate, by ``issuer`` (DER) and ``serial``, and what its key made.

    ``attributes`` is what was signed, ``signature`` the result, ``is_rsa`` whether by RSA; ``has_timestamp``
    where others countersigned.
    """

    issuer: bytes
    serial: int
    attributes: bytes
    signature: bytes
    is_rsa: bool
    has_timestamp: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedData:
    """An image's signature. ``digest`` is the image's, by hashlib's ``algorithm``; certificates are DER."""

    algorithm: str
    digest: bytes
    page_hashes: bool
    certificates: tuple[bytes, ...]
    signer: Signer


def image_digest(image: Image, algorithm: str) -> bytes:
    """The digest of the image by hashlib's ``algorithm``, as a signature has it.

    All of the file counts, but its checksum, where its signature is, and the signature. A file that has
    none is filled up with zeros to where one could be. Raises ``SignatureError`` where the headers have
    no place for a signature.
    """
    offset, size = _table(image)
    field = _field(image)
    end = offset + size if size else len(image.data)
    view = memoryview(image.data)
    digest = hashlib.new(algorithm, usedforsecurity=False)
    digest.update(view[: image.checksum_offset])
    digest.update(view[image.checksum_offset + 4 : field])
    digest.update(view[field + 8 : offset if size else end])
    digest.update(view[end:])
    if not size:
        digest.update(bytes(-len(image.data) % _ALIGNMENT))
    return digest.digest()


def without_signature(image: Image) -> bytes:
    """The file without its signature. Raises ``SignatureError`` where something else is behind it."""
    offset, size = _table(image)
    if not size:
        return image.data
    if image.data[offset + size :].strip(b"\0"):
        raise _wrong(image, "there is something behind its signature, which can't be taken off")
    field = _field(image)
    return image.data[:field] + bytes(8) + image.data[field + 8 : offset]


def read_signature(image: Image) -> SignedData:
    """The signature in ``image``; its digest is that of the image.

    Raises ``NotSigned``, or ``SignatureError`` for one that can't be read or is of other bytes.
    """
    offset, size = _table(image)
    if not size:
        raise NotSigned(f"{image.path.name}: it is not signed: {REFUSED}")
    try:
        signature = _parse(_content(image.data[offset : offset + size]))
    except _Malformed as error:
        raise _wrong(image, f"its signature is damaged, {error}: {REFUSED}") from None
    if signature.digest != image_digest(image, signature.algorithm):
        raise _wrong(
            image,
            f"its signature is of other bytes, by {signature.algorithm}: it was changed after it was "
            f"signed. {REFUSED}",
        )
    return signature


class _Malformed(Exception):
    """What is wrong with a signature's bytes."""


def _wrong(image: Image, what: str) -> SignatureError:
    return SignatureError(f"{image.path.name}: {what}")


def _field(image: Image) -> int:
    """The offset of the directory that tells where the signature is."""
    if len(image.directories) <= Directory.SECURITY:
        raise _wrong(image, "its headers have no place for a signature: link it again")
    return image.checksum_offset + 48 + 8 * Directory.SECURITY


def _table(image: Image) -> tuple[int, int]:
    """Offset and size of the table of certificates in the file; zeros where there is none."""
    offset, size = image.directory(Directory.SECURITY)
    if not size:
        return 0, 0
    if offset + size > len(image.data):
        raise _wrong(image, "its signature goes on behind the file's end: copy or sign it again")
    if offset < _field(image) + 8:
        raise _wrong(image, "its signature lies in its headers: sign it again")
    return offset, size


def _content(table: bytes) -> bytes:
    """The PKCS #7 in a table of certificates: the first entry of that kind."""
    at = 0
    for _ in range(MAX_ELEMENTS):
        if len(table) - at < _ENTRY.size:
            break
        length, revision, kind = _ENTRY.unpack_from(table, at)
        if not _ENTRY.size <= length <= len(table) - at:
            raise _Malformed(f"an entry of its table has {length} bytes")
        if (revision, kind) == (_REVISION_2, _PKCS_SIGNED_DATA):
            return table[at + _ENTRY.size : at + length]
        at += -(-length // _ALIGNMENT) * _ALIGNMENT
    raise _Malformed("its table has none of a kind that is known here")


class _Elements:
    """DER elements one after the other. What is not as expected raises ``_Malformed``."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def tag(self) -> int | None:
        """The next element's; None at the end."""
        return self._data[self._at] if self._at < len(self._data) else None

    @property
    def rest(self) -> bytes:
        """The bytes that were not taken."""
        return self._data[self._at :]

    def take(self, tag: int) -> bytes:
        """The content of the next element, which has to have this ``tag``."""
        return self.take_whole(tag)[1]

    def take_whole(self, tag: int) -> tuple[bytes, bytes]:
        """The next element, and its content."""
        if self.tag != tag:
            raise _Malformed(f"it has no element 0x{tag:02X} where one is due")
        start = self._at + 2
        head = self._data[self._at + 1 : start]
        length = head[0] if head else 0x80
        if length >= 0x80:
            octets = self._data[start : start + length - 0x80]
            if not 1 <= len(octets) <= 4 or len(octets) != length - 0x80 or not octets[0]:
                raise _Malformed("it has an element without a length")
            start, length = start + len(octets), int.from_bytes(octets, "big")
            if length < 0x80:
                raise _Malformed("it has a length in too many bytes")
        end = start + length
        if end > len(self._data):
            raise _Malformed("it has an element that does not fit in")
        whole, content = self._data[self._at : end], self._data[start:end]
        self._at = end
        return whole, content

    def enter(self, tag: int) -> _Elements:
        """The elements in the next one."""
        return _Elements(self.take(tag))

    def all(self, tag: int) -> Iterator[tuple[bytes, bytes]]:
        """All that are left, each whole, and its content."""
        for _ in range(MAX_ELEMENTS):
            if self.tag is None:
                return
            yield self.take_whole(tag)
        raise _Malformed("it has too many elements")

    def only(self, tag: int) -> bytes:
        """The content of the next element, which has to be the last."""
        content = self.take(tag)
        self.end()
        return content

    def end(self) -> None:
        """Nothing is left."""
        if self._at != len(self._data):
            raise _Malformed("it has more elements than are due")

    def algorithm(self) -> str:
        """A digest's algorithm, which has no parameters."""
        name = _ALGORITHMS.get(self.plain_algorithm())
        if name is None:
            raise _Malformed("it is by a digest that is not known here")
        return name

    def plain_algorithm(self) -> bytes:
        """An algorithm's object identifier."""
        elements = self.enter(_SEQUENCE)
        which = elements.take(_OBJECT)
        if elements.tag is not None and elements.only(_NULL):
            raise _Malformed("it has a NULL that is none")
        return which


def _parse(content: bytes) -> SignedData:
    """The signature that the PKCS #7 ``content`` is."""
    outermost = _Elements(content)
    outer = outermost.enter(_SEQUENCE)
    if len(outermost.rest) >= _ALIGNMENT or outermost.rest.strip(b"\0"):
        raise _Malformed("something is behind it")
    _expect(outer.take(_OBJECT), _SIGNED_DATA, "it is no PKCS #7 signed data")
    signed = _Elements(_Elements(outer.only(_FIRST)).only(_SEQUENCE))
    _expect(signed.take(_INTEGER), b"\1", "its version is not 1")
    algorithms = signed.enter(_SET)
    algorithm = algorithms.algorithm()
    algorithms.end()
    subject = signed.enter(_SEQUENCE)
    _expect(subject.take(_OBJECT), _INDIRECT_DATA, "it is not Authenticode's")
    content = _Elements(subject.only(_FIRST)).only(_SEQUENCE)
    certificates = tuple(_certificates(signed.enter(_FIRST)))
    if signed.tag == _SECOND:
        signed.take(_SECOND)  # lists of revoked certificates
    signers = _Elements(signed.only(_SET))
    signer = _signer(signers.enter(_SEQUENCE), algorithm, content)
    signers.end()
    about = _Elements(content)
    data = about.take(_SEQUENCE)
    message = _Elements(about.only(_SEQUENCE))
    if message.algorithm() != algorithm:
        raise _Malformed("it is by two digests")
    return SignedData(
        algorithm=algorithm,
        digest=message.only(_OCTETS),
        page_hashes=any(identifier in data for identifier in _PAGE_HASHES),
        certificates=certificates,
        signer=signer,
    )


def _certificates(elements: _Elements) -> Iterator[bytes]:
    """Each certificate: what is signed in it, by what, and the signature, which is of whole bytes."""
    for whole, content in elements.all(_SEQUENCE):
        parts = _Elements(content)
        parts.take(_SEQUENCE)
        parts.take(_SEQUENCE)
        _expect(parts.only(_BITS)[:1], b"\0", "it has a certificate without a signature")
        yield whole


def _signer(elements: _Elements, algorithm: str, content: bytes) -> Signer:
    """The signer's part; what it says of ``content`` is compared."""
    _expect(elements.take(_INTEGER), b"\1", "its signer's version is not 1")
    name = elements.enter(_SEQUENCE)
    issuer, _ = name.take_whole(_SEQUENCE)
    serial = int.from_bytes(name.only(_INTEGER), "big", signed=True)
    if elements.algorithm() != algorithm:
        raise _Malformed("it is by two digests")
    signed = elements.take(_FIRST)
    values: dict[bytes, bytes] = {}
    for _, encoded in _Elements(signed).all(_SEQUENCE):
        attribute = _Elements(encoded)
        identifier = attribute.take(_OBJECT)
        if identifier in values:
            raise _Malformed("it has an attribute twice")
        values[identifier] = attribute.only(_SET)
    kind = _Elements(values.get(_CONTENT_TYPE, b"")).only(_OBJECT)
    _expect(kind, _INDIRECT_DATA, "it is not Authenticode's")
    digest = _Elements(values.get(_MESSAGE_DIGEST, b"")).only(_OCTETS)
    expected = hashlib.new(algorithm, content, usedforsecurity=False).digest()
    _expect(digest, expected, "its content is not what was signed")
    is_rsa = elements.plain_algorithm() in _RSA
    signature = elements.take(_OCTETS)
    has_timestamp = elements.tag is not None
    if has_timestamp:
        elements.only(_SECOND)
    return Signer(
        issuer=issuer,
        serial=serial,
        attributes=_set_of(signed),
        signature=signature,
        is_rsa=is_rsa,
        has_timestamp=has_timestamp,
    )


def _set_of(content: bytes) -> bytes:
    """``content`` as the SET that was signed; in the signature it stands as [0] instead."""
    if len(content) < 0x80:
        return bytes([_SET, len(content)]) + content
    length = len(content).to_bytes(-(-len(content).bit_length() // 8), "big")
    return bytes([_SET, 0x80 + len(length)]) + length + content


def _expect(found: bytes, expected: bytes, otherwise: str) -> None:
    if found != expected:
        raise _Malformed(otherwise)
