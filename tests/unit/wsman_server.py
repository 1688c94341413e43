"""A WS-Management endpoint on this machine, as an ordinary process."""

from __future__ import annotations

import datetime
import ipaddress
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pytest_kdriver.guest.links.winrm import WinrmConfig

PROGRAM = Path(__file__).parents[2] / "vm/images/winevm/files/opt/kdriver/wsman/wsman.py"
HOST = "127.0.0.1"
USER = "tester"
PASSWORD = "not-a-secret-1"


class WsmanServer:
    """The endpoint, on ports of its own choice, over HTTP and over HTTPS.

    ``folder`` gets its files; ``options`` are more of its command line. ``certificate`` is what a client
    trusts.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate = folder / "certificate.pem"
        key = folder / "key.pem"
        _write_certificate(self.certificate, key)
        users = folder / "users"
        users.touch(mode=0o600)
        users.write_text(f"{USER}:{PASSWORD}\nother:other-secret-2\n")
        self.process = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                *("--users", users, "--address", HOST, "--http", "0", "--https", "0"),
                *("--certificate", self.certificate, "--key", key),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        word, *ports = line.split()
        assert word == "ready", line
        numbers = dict(port.split("=") for port in ports)
        self.http_port, self.https_port = int(numbers["http"]), int(numbers["https"])

    def __enter__(self) -> WsmanServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def config(self, **changes: Any) -> WinrmConfig:
        """How a link gets here: over HTTPS, or what ``changes`` says. The port is that of the scheme."""
        from pytest_kdriver.guest.links.winrm import WinrmConfig

        config = WinrmConfig(host=HOST, user=USER, password=PASSWORD, ca=self.certificate)
        config = replace(config, **changes)
        if config.port is None:
            config = replace(config, port=self.https_port if config.https else self.http_port)
        return config

    def kill(self) -> None:
        """As a machine that loses its power."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, and with it what it started."""
        self.process.terminate()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _write_certificate(certificate: Path, key: Path) -> None:
    """A certificate for this address, signed by itself."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    unfinished = certificate.with_suffix(
        ".new"
    )  # a client that waits for the server may be reading it
    unfinished.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    unfinished.rename(certificate)
    key.touch(mode=0o600)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
