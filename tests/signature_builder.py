"""Signatures made by hand, as far as they can be without a key: for what reads digests alone."""

from __future__ import annotations

import hashlib
import struct

from tests.pe_builder import DIRECTORIES, OPTIONAL_HEADER, patched

FIELD = DIRECTORIES + 4 * 8
"""Where in a built image's file its signature's place is."""

_SHA256 = bytes.fromhex("608648016503040201")
_INDIRECT_DATA = bytes.fromhex("2b060104018237020104")


def element(tag: int, *contents: bytes) -> bytes:
    """A DER element."""
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 + len(length)]) + length + content


def identifier(content: bytes) -> bytes:
    """An object identifier, by its encoding."""
    return element(0x06, content)


CERTIFICATE = element(0x30, element(0x30), element(0x30), element(0x03, b"\0"))
"""What has a certificate's outermost parts, and nothing in them."""


def pkcs7(digest: bytes, certificates: bytes = CERTIFICATE) -> bytes:
    """Authenticode's signature of an image with this SHA-256. Nobody made it: its last part is zeros."""
    algorithm = element(0x30, identifier(_SHA256), b"\x05\x00")
    data = element(0x30, identifier(bytes.fromhex("2b06010401823702010f")), element(0x30))
    content = data + element(0x30, algorithm, element(0x04, digest))
    attributes = [
        (bytes.fromhex("2a864886f70d010903"), identifier(_INDIRECT_DATA)),
        (bytes.fromhex("2a864886f70d010904"), element(0x04, hashlib.sha256(content).digest())),
    ]
    signer = element(
        0x30,
        b"\x02\x01\x01",
        element(0x30, element(0x30), b"\x02\x01\x07"),
        algorithm,
        element(0xA0, *(element(0x30, identifier(i), element(0x31, v)) for i, v in attributes)),
        element(0x30, identifier(bytes.fromhex("2a864886f70d010101")), b"\x05\x00"),
        element(0x04, bytes(256)),
    )
    signed = element(
        0x30,
        b"\x02\x01\x01",
        element(0x31, algorithm),
        element(0x30, identifier(_INDIRECT_DATA), element(0xA0, element(0x30, content))),
        element(0xA0, certificates),
        element(0x31, signer),
    )
    return element(0x30, identifier(bytes.fromhex("2a864886f70d010702")), element(0xA0, signed))


def digest_of(image: bytes) -> bytes:
    """The SHA-256 that a signature of ``image``, as it is built and not signed yet, has."""
    checksum = OPTIONAL_HEADER + 64
    counted = image[:checksum] + image[checksum + 4 : FIELD] + image[FIELD + 8 :]
    return hashlib.sha256(counted + bytes(-len(image) % 8)).digest()


def with_signature(image: bytes, signature: bytes | None = None) -> bytes:
    """``image`` with ``signature`` in it, else with one that has the right digest. No checksum is made."""
    signature = pkcs7(digest_of(image)) if signature is None else signature
    entry = struct.pack("<IHH", 8 + len(signature), 0x0200, 2) + signature
    entry += bytes(-len(entry) % 8)
    image += bytes(-len(image) % 8)
    return patched(image, FIELD, "<II", len(image), len(entry)) + entry
