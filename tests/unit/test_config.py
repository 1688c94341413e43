"""kdriver.toml and [tool.kdriver]: what they set, and what they say when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.errors import ConfigError


def write(folder: Path, text: str, name: str = "kdriver.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_nothing_set_is_the_defaults(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    assert (config.vm, config.isolation, config.manifest, config.timeout) == ((), None, None, 30.0)
    assert list(config.targets) == ["wine"]


def test_all_that_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "Cargo.toml").write_text("")
    config = load_config(
        write(
            tmp_path,
            """
            vm = ["old", "wine"]
            isolation = "test"
            manifest = "d"
            profile = "release"
            timeout = 2
            artifacts = "out"
            [targets.old]
            kind = "wine"
            wine = "/opt/wine"
            without = ["pool"]
            """,
        )
    )
    assert config.vm == ("old", "wine")
    assert config.isolation == "test"
    assert config.manifest == tmp_path / "d" / "Cargo.toml"
    assert (config.profile, config.timeout) == ("release", 2.0)
    assert config.artifacts == tmp_path / "out"
    old = config.target("old")
    assert (old.kind, old.wine, old.without) == ("wine", "/opt/wine", frozenset({"pool"}))


def test_pyproject_has_a_table_for_it(tmp_path: Path) -> None:
    write(tmp_path, '[tool.kdriver]\nvm = "wine"\n', "pyproject.toml")
    assert load_config(tmp_path).vm == ("wine",)


def test_a_pyproject_without_the_table_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "this is = no toml", "pyproject.toml")
    assert load_config(tmp_path).vm == ()


@pytest.mark.parametrize("where", ["Cargo.toml", "drivers/Cargo.toml"])
def test_the_usual_manifests_are_found(tmp_path: Path, where: str) -> None:
    (tmp_path / "drivers").mkdir()
    write(tmp_path, "", where)
    assert load_config(tmp_path).manifest == tmp_path / where


def test_the_root_is_the_nearest_folder_with_a_config(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert find_root(deep) == deep
    write(tmp_path, "")
    assert find_root(deep) == tmp_path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "vmm = 'wine'",
            r"kdriver.toml: kdriver: unknown key 'vmm' \(did you mean 'vm'\?\); allowed: vm, ",
        ),
        ("vm = 1", "vm is 1; allowed: a string, or a list of strings"),
        ("vm = 'win11'", "no target 'win11'.*; there are: wine"),
        ("isolation = 'tests'", "isolation is 'tests'; allowed: test, module, session, none"),
        ("timeout = 0", "timeout is 0; allowed: seconds, more than 0"),
        ("timeout = true", "timeout is True"),
        ("profile = 1", "profile is 1; allowed: a string"),
        ("manifest = 'nope'", "manifest 'nope': there is no "),
        ("targets = 1", r"targets is no table; write \[targets.NAME\]"),
        ("targets.x = 1", r"targets.x is no table; write \[targets.x\]"),
        ("[targets.x]\n", "targets.x: kind is None; allowed: wine"),
        ("[targets.x]\nkind='vmware'", "targets.x: kind is 'vmware'; allowed: wine"),
        ("[targets.wine]\nwhithout=[]", "unknown key 'whithout' .did you mean 'without'"),
        ("[targets.wine]\nwithout=['fly']", "without is 'fly'; allowed: kernel-log, "),
        ("vm = ", "kdriver.toml: "),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "kdriver.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="kdriver.toml"):
        load_config(tmp_path)


def test_an_unknown_target_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no target 'wne' \(did you mean 'wine'\?\); there are: wine"
    ):
        load_config(tmp_path).target("wne")
