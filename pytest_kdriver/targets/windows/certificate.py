"""The certificate of a guest's WinRM over HTTPS: made once with its disk image, for 127.0.0.1."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from typing import Final

from pytest_kdriver.errors import TargetError

ADDRESS: Final = "127.0.0.1"
"""Where a guest's ports are reached, see ``Domain.forwarded``."""

_LIFETIME: Final = timedelta(days=3652)
_SLACK: Final = timedelta(days=1)
"""How much earlier it begins: a guest's clock may be behind."""

_KEY_BITS: Final = 2048


def make_certificate() -> tuple[bytes, bytes]:
    """A new certificate with its key, a PFX without a password, and the certificate alone, in PEM.

    It signed itself, so it is also what a client is to trust. The key is in the PFX only.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import pkcs12
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise TargetError(
            "WinRM's certificate takes the package cryptography: "
            "pip install 'pytest-kdriver[windows]'"
        ) from None
    key = rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=True,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    addresses = [x509.IPAddress(IPv4Address(ADDRESS)), x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pfx = pkcs12.serialize_key_and_certificates(
        b"pytest-kdriver", key, certificate, None, serialization.NoEncryption()
    )
    return pfx, certificate.public_bytes(serialization.Encoding.PEM)
