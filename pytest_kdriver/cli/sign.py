"""``kdriver sign`` and ``kdriver verify``: test signatures of drivers' files."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pytest_kdriver.errors import ConfigError, KdriverError
from pytest_kdriver.image.signing import Certificate, own_certificate, sign, verify


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the two commands."""
    parser = commands.add_parser(
        "sign",
        help="make signed copies of drivers' files",
        description="Make a signed copy of each FILE, with a test certificate of the user's own, which the "
        "first call makes. The path of each copy is printed. FILE itself stays as it is.",
    )
    parser.add_argument("file", nargs="*", type=Path, metavar="FILE", help="a .sys file")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="the copy's name, or a folder for copies of the same names "
        "(default: NAME.signed.sys beside NAME.sys)",
    )
    parser.add_argument(
        "--page-hashes", action="store_true", help="with a digest of each page, too"
    )
    parser.add_argument(
        "--certificate",
        action="store_true",
        help="tell where the certificate is, and how a Windows is told to trust it",
    )
    parser.set_defaults(call=_sign)
    parser = commands.add_parser(
        "verify",
        help="tell who signed drivers' files, and whether they were changed since",
        description="Look at the signature of each FILE: is it of these bytes, and made by the key of a "
        "valid certificate? Whether anybody trusts that is not asked. The exit code is 1 if one is not, "
        "else 0.",
    )
    parser.add_argument("file", nargs="+", type=Path, metavar="FILE", help="a .sys file")
    parser.set_defaults(call=_verify)


def _sign(options: argparse.Namespace) -> int:
    if not options.file and not options.certificate:
        raise ConfigError("nothing to sign: name a FILE; or --certificate, to see what signs")
    outputs = _outputs(options.file, options.output)
    if options.certificate:
        print(_about(own_certificate()))
    for file, output in zip(options.file, outputs, strict=True):
        sign(file, output, page_hashes=options.page_hashes)
        print(output)
    return 0


def _outputs(files: Sequence[Path], wanted: Path | None) -> list[Path]:
    """Where the copy of each file goes. Raises ``ConfigError`` where two would be one."""
    if wanted is None:
        outputs = [file.with_name(f"{file.stem}.signed{file.suffix}") for file in files]
    elif wanted.is_dir():
        outputs = [wanted / file.name for file in files]
    elif len(files) > 1:
        raise ConfigError(f"{wanted} is no folder, and can't be the copy of {len(files)} files")
    else:
        outputs = [wanted] * len(files)
    for output, count in Counter(output.absolute() for output in outputs).items():
        if count > 1:
            raise ConfigError(f"{output} would be the copy of {count} files")
    for file, output in zip(files, outputs, strict=True):
        if output.exists() and file.exists() and output.samefile(file):
            raise ConfigError(f"{file} would be overwritten by its copy: name another with -o")
    return outputs


def _about(certificate: Certificate) -> str:
    name = certificate.path.name
    return "\n".join(
        (
            f"certificate  {certificate.path}",
            f"key          {certificate.key}",
            f"subject      {certificate.subject}",
            f"SHA-256      {certificate.fingerprint}",
            f"valid until  {certificate.valid_until:%Y-%m-%d}",
            "",
            "On Windows, as administrator (from Microsoft's documentation, not verified on Windows):",
            "",
            "    bcdedit /set testsigning on",
            f"    certutil -addstore Root {name}",
            f"    certutil -addstore TrustedPublisher {name}",
            "    shutdown /r /t 0",
            "",
            "The first is what a driver needs to be loaded, where Secure Boot is off; the certificate is for",
            "the installation of driver packages and for signtool verify.",
        )
    )


def _verify(options: argparse.Namespace) -> int:
    failed = 0
    for file in options.file:
        try:
            signature = verify(file)
        except KdriverError as error:
            print(f"kdriver: {error}", file=sys.stderr)
            failed = 1
        else:
            more = ", with page hashes" if signature.page_hashes else ""
            print(
                f"{file}: signed by {signature.subject}, certificate {signature.fingerprint}, "
                f"by {signature.digest_algorithm}{more}"
            )
    return failed
