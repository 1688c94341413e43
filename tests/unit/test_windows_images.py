"""What is said of an image of Windows before anything is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_kdriver.cli import main
from pytest_kdriver.errors import ConfigError
from pytest_kdriver.targets.recipe import find_recipe, read_recipe
from pytest_kdriver.targets.runs import Run
from pytest_kdriver.targets.windows.images import (
    Source,
    build_image,
    describe_target,
    read_product_key,
)
from pytest_kdriver.vm_config import vm_config

KEY = "AAAAA-BBBBB-CCCCC-DDDDD-EEEEE"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDRIVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "kdriver.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    run.close()


def test_a_machine_has_virtio_s_devices_where_its_drivers_are_given() -> None:
    table, machine = describe_target(find_recipe("win11"), virtio=False)
    assert (machine.bus, machine.nic, machine.agent_port) == ("sata", "e1000e", "com2")
    assert table["winrm_ca"] == "winrm.pem"
    assert table["winrm_user"] == "kdriver"
    _, machine = describe_target(find_recipe("win11"), virtio=True)
    assert (machine.bus, machine.nic) == ("virtio", "virtio")
    assert machine.agent_port == "virtio:kdriver.agent"


def test_a_target_with_it_is_reached_by_winrm_if_that_is_asked_for() -> None:
    table, _ = describe_target(find_recipe("win10"), virtio=False)
    config = vm_config(table, {"agent": "winrm"})
    assert config.tcp_port == 5986
    assert config.winrm_command == "C:\\Windows\\kdagent.exe"


def test_what_the_recipe_says_counts_more(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "vm/images/mine"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        '[windows]\nrelease = "w10"\nindex = 1\n[target]\nbus = "virtio"\nagent_port = "com3"\n'
    )
    recipe = read_recipe(folder)
    _, machine = describe_target(recipe, virtio=False)
    assert (machine.bus, machine.nic, machine.agent_port) == ("virtio", "e1000e", "com3")
    source = Source(iso=tmp_path / "windows.iso")
    with pytest.raises(ConfigError, match=r"needs virtio's drivers \(viostor\): --virtio-win FILE"):
        build_image(recipe, source, run, lambda _: None)


@pytest.mark.parametrize("text", [KEY, f" {KEY.lower()}\n"])
def test_a_product_key_is_read(text: str) -> None:
    assert read_product_key(text, "the file") == KEY


@pytest.mark.parametrize("text", ["", "AAAAA-BBBBB", f"{KEY}-FFFFF", "<Key>", KEY.replace("-", "")])
def test_what_is_no_product_key_is_told_without_it(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        read_product_key(text, "the file")
    assert str(failure.value) == (
        "the file has no product key: five groups of five letters and digits"
    )
    assert failure.value.__cause__ is None


def test_a_source_does_not_show_its_product_key() -> None:
    assert KEY not in repr(Source(iso=Path("a.iso"), product_key=KEY))


def test_the_commands_say_what_is_wrong(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libvirt")

    def told(*arguments: str) -> tuple[int, str]:
        return main(["image", *arguments]), capsys.readouterr().err

    code, err = told("build", "win10")
    assert code == 1
    assert "kdriver image build win10 --iso FILE" in err
    code, err = told("build", "winevm", "--iso", "a.iso")
    assert code == 2
    assert "winevm takes no --iso" in err
    code, err = told("build", "win10", "--iso", "none.iso")
    assert code == 1
    assert "none.iso can't be used: No such file or directory" in err
    secret = project / "key"
    secret.write_text("hunter2")
    code, err = told("build", "win10", "--iso", "a.iso", "--product-key-file", str(secret))
    assert code == 2
    assert "has no product key" in err
    assert "hunter2" not in err
    secret.write_bytes(b"\xff\xfehunter2")
    code, err = told("build", "win10", "--iso", "a.iso", "--product-key-file", str(secret))
    assert code == 2
    assert "can't be read" in err
    assert "hunter2" not in err
    monkeypatch.setenv("KDRIVER_PRODUCT_KEY", "hunter2")
    code, err = told("build", "win10", "--iso", "a.iso")
    assert code == 2
    assert err.endswith(
        "KDRIVER_PRODUCT_KEY has no product key: five groups of five letters and digits\n"
    )
    with pytest.raises(SystemExit):
        main(["image", "build", "win10", "--iso", "a.iso", "--timeout", "0"])
    assert main(["image", "info", "win11"]) == 0
    assert "not made yet: kdriver image build win11 --iso FILE" in capsys.readouterr().out
