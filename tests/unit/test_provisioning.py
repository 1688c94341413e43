"""The CD of an unattended installation, read back by readers that nobody here wrote."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.recipe import Recipe, Release, find_recipes
from pytest_kdriver.targets.windows.answer_file import Secrets, answer_file
from pytest_kdriver.targets.windows.certificate import make_certificate
from pytest_kdriver.targets.windows.images import describe_target
from pytest_kdriver.targets.windows.provisioning import needed_drivers, read_drivers, write_cd
from pytest_kdriver.targets.windows.scrubbing import patterns, scrub_disk

ROOT = Path(__file__).parents[2]
RECIPES = [r for r in find_recipes(ROOT) if r.windows and r.folder.parent == ROOT / "vm/images"]
DRIVERS = ("viostor", "vioserial", "NetKVM")

needs_isoinfo = pytest.mark.skipif(
    shutil.which("isoinfo") is None, reason="needs isoinfo (Debian: genisoimage)"
)
needs_xorriso = pytest.mark.skipif(
    shutil.which("xorriso") is None, reason="needs xorriso (Debian: xorriso)"
)

Listed = dict[str, bytes]


def by_isoinfo(iso: Path, folder: Path) -> Listed:
    """What Joliet says, as Windows sees it."""
    names = subprocess.run(
        ["isoinfo", "-J", "-f", "-i", iso], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        name: content
        for name in names
        if (
            content := subprocess.run(
                ["isoinfo", "-J", "-x", name, "-i", iso], capture_output=True, check=True
            ).stdout
        )
    }


def by_xorriso(iso: Path, folder: Path) -> Listed:
    subprocess.run(
        ["xorriso", "-osirrox", "on", "-indev", iso, "-extract", "/", folder / "out"],
        capture_output=True,
        check=True,
    )
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    return {f"/{path.relative_to(folder / 'out')}": path.read_bytes() for path in files}


READERS = [
    pytest.param(by_isoinfo, marks=needs_isoinfo, id="isoinfo"),
    pytest.param(by_xorriso, marks=needs_xorriso, id="xorriso"),
]


@pytest.fixture(scope="module")
def virtio_win(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CD like virtio-win's, written by another program."""
    if shutil.which("genisoimage") is None:
        pytest.skip("needs genisoimage (Debian: genisoimage)")
    folder = tmp_path_factory.mktemp("virtio")
    for driver in DRIVERS:
        for release in ("w10", "w11", "2k22", "2k25"):
            place = folder / "cd" / driver / release / "amd64"
            place.mkdir(parents=True)
            (place / f"{driver.lower()}.inf").write_text(f"{driver} {release}")
            (place / f"{driver.lower()}_with_a_long_name.sys").write_bytes(bytes(5000))
            (place / "folder").mkdir()
    iso = folder / "virtio-win.iso"
    command = ["genisoimage", "-quiet", "-J", "-r", "-o", str(iso), str(folder / "cd")]
    subprocess.run(command, check=True)
    return iso


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("virtio", [False, True], ids=["plain", "virtio"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_each_recipe_s_cd_is_read_back(
    recipe: Recipe,
    virtio: bool,
    read: Callable[[Path, Path], Listed],
    tmp_path: Path,
    virtio_win: Path,
) -> None:
    assert recipe.windows is not None
    _, machine = describe_target(recipe, virtio=virtio)
    answer = answer_file(recipe.windows, machine, Secrets(password="Pw-1"))
    agent = tmp_path / "agent"
    agent.write_bytes(b"MZ an agent" * 10000)
    needed = needed_drivers(machine)
    assert needed == (DRIVERS if virtio else ())
    drivers = read_drivers(virtio_win, needed, recipe.windows.release)
    write_cd(tmp_path / "cd.iso", answer, agent, drivers)
    assert (tmp_path / "cd.iso").stat().st_mode & 0o777 == 0o600
    expected = {"/autounattend.xml": answer, "/kdagent.exe": agent.read_bytes()}
    for driver in needed:
        name = f"/$WinPEDriver$/{driver}/{driver.lower()}"
        expected[f"{name}.inf"] = f"{driver} {recipe.windows.release}".encode()
        expected[f"{name}_with_a_long_name.sys"] = bytes(5000)
    assert read(tmp_path / "cd.iso", tmp_path) == expected


def test_no_secret_of_the_cd_is_anywhere_else(tmp_path: Path) -> None:
    recipe = RECIPES[0]
    assert recipe.windows is not None
    _, machine = describe_target(recipe, virtio=False)
    agent = tmp_path / "agent"
    agent.write_bytes(b"MZ")
    answer = answer_file(recipe.windows, machine, Secrets(password="Pw-unheard-of-1"))
    write_cd(tmp_path / "cd.iso", answer, agent, {})
    written = [path for path in tmp_path.iterdir() if b"Pw-unheard" in path.read_bytes()]
    assert written == [tmp_path / "cd.iso"]
    with pytest.raises(FileExistsError):  # nobody can have put a file there that he reads
        write_cd(tmp_path / "cd.iso", answer, agent, {})


@pytest.mark.parametrize(
    ("names", "release", "sentence"),
    [
        (("viostor", "balloon"), "w10", "has no drivers viostor, balloon for w10"),
        (("viostor",), "w7", "has no drivers viostor for w7"),
    ],
)
def test_drivers_that_are_not_there_are_told(
    virtio_win: Path, names: tuple[str, ...], release: Release, sentence: str
) -> None:
    with pytest.raises(TargetError, match=sentence):
        read_drivers(virtio_win, names, release)


def test_what_is_no_cd_of_drivers_is_told(virtio_win: Path, tmp_path: Path) -> None:
    for content in (b"", b"no CD", virtio_win.read_bytes()[:40000]):
        (tmp_path / "cd.iso").write_bytes(content)
        with pytest.raises(TargetError, match=r"cd\.iso can't be read as a CD"):
            read_drivers(tmp_path / "cd.iso", ("viostor",), "w10")
    with pytest.raises(TargetError, match="can't be read"):
        read_drivers(tmp_path / "none.iso", ("viostor",), "w10")


def test_winrm_s_certificate_is_taken_by_who_trusts_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.serialization import pkcs12

    pfx, pem = make_certificate()
    key, certificate, _ = pkcs12.load_key_and_certificates(pfx, None)
    assert key is not None
    assert certificate is not None
    assert certificate.public_bytes(serialization.Encoding.PEM) == pem
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "both.pem").write_bytes(private + pem)
    (tmp_path / "ca.pem").write_bytes(pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "both.pem")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's
    for name, accepted in (("127.0.0.1", True), ("127.0.0.2", False)):
        assert _handshake(client, server, name) is accepted


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bool:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    except ssl.SSLCertVerificationError:
        ours.close()
        return False
    finally:
        thread.join()
    return True


SECRETS = Secrets(password="Pw-1.unheard_of=24+chars", product_key="AAAAA-BBBBB-CCCCC-DDDDD-EEEEE")


def test_what_is_left_of_a_secret_on_a_disk_is_overwritten(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    wanted = patterns(SECRETS)
    assert SECRETS.password.encode("utf-16-le") in wanted
    size = 80 << 20
    places = [0, (16 << 20) - 5, (32 << 20) - 11, 50 << 20, size - 100]
    with disk.open("wb") as file:
        file.truncate(size)
        file.seek(1 << 20)
        file.write(b"\x01" * (40 << 20))  # data with neighbours, between holes
        for place, pattern in zip(places * 2, wanted, strict=False):
            file.seek(place)
            file.write(pattern + b"!")
    before = disk.stat()
    assert scrub_disk(disk, SECRETS) == len(places)
    content = disk.read_bytes()
    assert not [pattern for pattern in wanted if pattern in content]
    assert len(content) == size
    assert content.count(b"!") == len(places)
    assert content.count(b"\x01") > (40 << 20) - 1000
    assert disk.stat().st_blocks == before.st_blocks  # it is as sparse as it was
    assert scrub_disk(disk, SECRETS) == 0


def test_setup_s_own_way_to_hide_a_password_is_known() -> None:
    # Microsoft's example of AdministratorPassword: "pwAdministratorPassword", in UTF-16 and base64.
    example = b"cAB3AEEAZABtAGkAbgBpAHMAdAByAGEAdABvAHIAUABhAHMAcwB3AG8AcgBkAA=="
    assert example in patterns(Secrets(password="pw"))
