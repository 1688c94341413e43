"""Images as files: what is exported comes in again, and nothing else does."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.disk_images import DiskImage, list_images, make_once, remove
from pytest_kdriver.targets.image_archive import export_image, import_image
from pytest_kdriver.targets.recipe import read_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows.passwords import keep_password

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="needs qemu-img (Debian: qemu-utils)"
)

PASSWORD = "Xq7-correct-horse"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "cache"


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    run.close()
    assert not run.path.exists()


@pytest.fixture
def image(tmp_path: Path, run: Run) -> DiskImage:
    """A Windows', with a small disk."""
    folder = tmp_path / "vm/images/mywindows"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('[windows]\nrelease = "w10"\nindex = 1\n')
    recipe = read_recipe(folder)

    def build(making: Path, phase: Callable[[str], None]) -> dict[str, object]:
        make_disk(making / "disk.qcow2")
        (making / "winrm.pem").write_text("a certificate")
        (making / "key").write_text("a key")
        (making / "key").chmod(0o600)
        return {"bus": "sata", "winrm_ca": "winrm.pem"}

    made = make_once(recipe, f"mywindows-{recipe.key()}-01234567", run, lambda _: None, build)
    keep_password(made.folder.name, PASSWORD)
    return made


def make_disk(path: Path, *options: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "1M"], check=True
    )


def content(image: DiskImage) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mode & 0o777, path.read_bytes())
        for path in image.folder.iterdir()
    }


def test_what_is_exported_comes_in_again(image: DiskImage, tmp_path: Path, run: Run) -> None:
    before = content(image)
    file = tmp_path / "image.tar"
    export_image(image, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert remove("mywindows")
    again = import_image(file, run)
    assert content(again) == before
    assert again.is_unchanged
    assert (again.folder, again.sha256, again.made) == (image.folder, image.sha256, image.made)
    assert again.target == {"bus": "sata", "winrm_ca": again.folder / "winrm.pem"}
    assert list_images() == [again]


def test_others_can_read_it_and_its_sums_are_sha256sum_s(image: DiskImage, tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    export_image(image, file)
    subprocess.run(["tar", "-xf", str(file), "-C", str(tmp_path)], check=True)
    folder = tmp_path / image.folder.name
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_no_password_is_exported(image: DiskImage, tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    export_image(image, file)
    assert PASSWORD.encode() not in file.read_bytes()


def test_a_disk_that_was_changed_is_not_exported(image: DiskImage, tmp_path: Path) -> None:
    image.disk.chmod(0o644)
    with image.disk.open("ab") as file:
        file.write(b"more")
    with pytest.raises(TargetError, match="is not what it was"):
        export_image(image, tmp_path / "image.tar")
    assert not list(tmp_path.glob("*image.tar*"))


def test_an_image_that_is_there_is_not_replaced(image: DiskImage, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "image.tar"
    export_image(image, file)
    before = content(image)
    with pytest.raises(TargetError, match=r"already: kdriver image remove mywindows-"):
        import_image(file, run)
    assert content(image) == before


def test_an_archive_that_was_cut_or_changed_is_refused(
    image: DiskImage, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "image.tar"
    export_image(image, file)
    remove("mywindows")
    whole = file.read_bytes()
    for length in (0, 100, 512, 1000, len(whole) // 2, len(whole) - 10240):
        file.write_bytes(whole[:length])
        with pytest.raises(TargetError, match="no image that kdriver image export wrote"):
            import_image(file, run)
    for place in range(1, len(whole) - 10240, 4099):
        changed = bytearray(whole)
        changed[place] ^= 0x40
        file.write_bytes(changed)
        try:
            import_image(file, run)
        except TargetError:
            continue
        # What is no file's content: padding, or a time of the header's... which its checksum holds.
        assert whole[place] == 0
        remove("mywindows")
    assert list_images() == []


FOLDER = f"evil-{'0' * 16}"


class Archive:
    """An archive of a stranger's, with a sound image in it unless it is told otherwise."""

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "evil.qcow2"
        make_disk(self.disk)
        self.path = folder / "evil.tar"
        self.target = ""
        self.members: list[tuple[tarfile.TarInfo, bytes]] = []
        self.name = "evil"

    def add(self, name: str, content: bytes = b"", **settings: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in settings.items():
            setattr(info, key, value)
        self.members.append((info, content))

    def write(self, *, sums: bool = True) -> Path:
        disk = self.disk.read_bytes()
        toml = (
            f'name = {json.dumps(self.name)}\nmade = "2026"\nsize = {len(disk)}\nmtime_ns = 1\n'
            f'sha256 = "{hashlib.sha256(disk).hexdigest()}"\n[target]\n{self.target}'
        ).encode()
        files = {"disk.qcow2": disk, "image.toml": toml}
        with tarfile.open(self.path, "w", format=tarfile.GNU_FORMAT) as archive:
            for info, content in self.members:
                archive.addfile(info, io.BytesIO(content))
                if info.isreg():
                    files[info.name.rpartition("/")[2]] = content
            for name in ("disk.qcow2", "image.toml"):
                self._put(archive, name, files[name])
            text = "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in files.items())
            if sums:
                self._put(archive, "SHA256SUMS", text.encode())
        return self.path

    @staticmethod
    def _put(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(f"{FOLDER}/{name}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


def test_a_stranger_s_sound_image_comes_in(archive: Archive, run: Run) -> None:
    archive.target = 'bus = "sata"\n'
    assert import_image(archive.write(), run).target == {"bus": "sata"}


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside",
        f"{FOLDER}/../outside",
        f"{FOLDER}/a/b",
        f"{FOLDER}/.hidden",
        f"{FOLDER}/",
        FOLDER,
        "",
        f"{FOLDER}/a b",
        f"other-{'1' * 16}/file",
    ],
)
def test_a_file_of_another_place_is_refused(archive: Archive, run: Run, name: str) -> None:
    archive.add(name, b"evil")
    with pytest.raises(TargetError, match="no image that kdriver image export wrote"):
        import_image(archive.write(), run)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
    ],
)
def test_what_is_no_plain_file_is_refused(archive: Archive, run: Run, kind: bytes) -> None:
    archive.add(f"{FOLDER}/link", type=kind, linkname="/etc/passwd")
    with pytest.raises(TargetError, match="which is no plain file"):
        import_image(archive.write(), run)


def test_a_file_twice_and_too_many_files_are_refused(archive: Archive, run: Run) -> None:
    archive.add(f"{FOLDER}/image.toml", b"first")
    with pytest.raises(TargetError, match="'image.toml' twice"):
        import_image(archive.write(), run)
    archive.members.clear()
    for number in range(100):
        archive.add(f"{FOLDER}/file{number}")
    with pytest.raises(TargetError, match="has more in it"):
        import_image(archive.write(), run)


def test_a_size_that_does_not_fit_is_refused_before_it_is_written(
    archive: Archive, run: Run
) -> None:
    archive.add(f"{FOLDER}/large", b"", size=1 << 60)
    path = archive.path
    path.write_bytes(archive.members[0][0].tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(TargetError, match="does not fit"):
        import_image(path, run)


def test_a_negative_size_is_refused(archive: Archive, run: Run) -> None:
    archive.add(f"{FOLDER}/less", b"", size=-512)
    archive.path.write_bytes(archive.members[0][0].tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(TargetError, match="no plain file"):
        import_image(archive.path, run)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ('cdrom = "/etc/passwd"', "cdrom is '/etc/passwd', which is no file of its folder"),
        ('kernel = "../../secret"', "kernel is"),
        ('winrm_ca = "not-there"', "winrm_ca is"),
        ('network = "lab"', "asks for 'lab', a network of this machine"),
        ('uri = "qemu:///system"', "unknown key 'uri'"),
        ('disk = "/dev/sda"', "unknown key 'disk'"),
    ],
)
def test_an_image_that_leads_to_this_machine_s_files_is_refused(
    archive: Archive, run: Run, target: str, sentence: str
) -> None:
    archive.target = f"{target}\n"
    with pytest.raises(TargetError, match=sentence):
        import_image(archive.write(), run)
    assert list_images() == []


def test_a_disk_behind_which_is_another_file_is_refused(
    archive: Archive, run: Run, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(1 << 20))
    archive.disk.unlink()
    make_disk(archive.disk, "-F", "raw", "-b", str(secret))
    with pytest.raises(TargetError, match="leads to another file"):
        import_image(archive.write(), run)
    archive.disk.unlink()
    make_disk(archive.disk, "-o", f"data_file={secret},data_file_raw=on")
    with pytest.raises(TargetError, match="leads to another file"):
        import_image(archive.write(), run)
    archive.disk.write_bytes(b"no qcow2 at all" * 100)
    with pytest.raises(TargetError, match="qemu-img info failed"):
        import_image(archive.write(), run)


def test_an_image_that_calls_itself_otherwise_or_has_no_sums_is_refused(
    archive: Archive, run: Run
) -> None:
    with pytest.raises(TargetError, match="is not whole"):
        import_image(archive.write(sums=False), run)
    archive.name = "win10"
    with pytest.raises(TargetError, match="says of itself that it is another one"):
        import_image(archive.write(), run)


def test_a_full_disk_is_told_and_leaves_nothing(
    image: DiskImage, tmp_path: Path, run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "image.tar"
    export_image(image, file)
    remove("mywindows")

    class Free:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Free)
    with pytest.raises(TargetError, match="does not fit"):
        import_image(file, run)
    assert [path.name for path in (run.path).iterdir() if path.is_dir()] == []


def test_the_commands_export_and_import(
    image: DiskImage, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "image.tar"
    assert main(["image", "export", "mywindows", str(file)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{file}\n"
    assert f"windows-passwords/{image.folder.name}" in told.err
    assert PASSWORD not in told.out + told.err
    assert main(["image", "remove", "mywindows"]) == 0
    assert main(["image", "import", str(file)]) == 0
    assert str(image.folder) in capsys.readouterr().out
    assert main(["image", "import", str(tmp_path / "none")]) == 1
    assert main(["image", "export", "nothing", str(file)]) == 1
    assert list((tmp_path / "cache/runs").iterdir()) == [run.path]
