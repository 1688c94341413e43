"""The answer file of each recipe, held to what Microsoft's reference says of its elements."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TypeAlias

import pytest

from pytest_kdriver.targets.recipe import Recipe, find_recipes
from pytest_kdriver.targets.windows.answer_file import (
    NAMESPACE,
    Secrets,
    agent_port,
    answer_file,
)
from pytest_kdriver.targets.windows.images import describe_target
from pytest_kdriver.targets.windows.passwords import new_password
from pytest_kdriver.vm_config import VmConfig

ROOT = Path(__file__).parents[2]
RECIPES = {
    r.name: r for r in find_recipes(ROOT) if r.folder.parent == ROOT / "vm/images" and r.windows
}
KEY = "AAAAA-BBBBB-CCCCC-DDDDD-EEEEE"

Schema: TypeAlias = "re.Pattern[str] | dict[str, Schema]"

TEXT = re.compile(r".+")
NUMBER = re.compile(r"\d+")
FLAG = re.compile("true|false")
LOCALE = re.compile(r"[a-z]{2}-[A-Z]{2}")
SHOW = re.compile("Always|OnError|Never")
COMMANDS: Schema = {
    "RunSynchronousCommand*": {
        "Order": re.compile(r"[1-9]\d{0,2}"),
        "Path": re.compile(r".{1,259}"),
        "Description": TEXT,
        "Credentials": TEXT,
    }
}
LOCALES: dict[str, Schema] = {
    **dict.fromkeys(("InputLocale", "SystemLocale", "UILanguage", "UserLocale"), LOCALE),
    "UILanguageFallback": LOCALE,
}
PASSWORD: Schema = {"Value": TEXT, "PlainText": FLAG}

# From the pages of the "Unattended Windows Setup Reference", which are named after component and element:
# learn.microsoft.com/windows-hardware/customize/desktop/unattend/microsoft-windows-setup-userdata, and so on.
# A "*" is for a list's items, which have wcm:action="add" in all of its examples.
REFERENCE: dict[tuple[str, str], Schema] = {
    ("windowsPE", "Microsoft-Windows-International-Core-WinPE"): {
        **LOCALES,
        "SetupUILanguage": {"UILanguage": LOCALE, "WillShowUI": SHOW},
        "LayeredDriver": NUMBER,
    },
    ("windowsPE", "Microsoft-Windows-Setup"): {
        "DiskConfiguration": {
            "DisableEncryptedDiskProvisioning": FLAG,
            "WillShowUI": SHOW,
            "Disk*": {
                "DiskID": NUMBER,
                "WillWipeDisk": FLAG,
                "CreatePartitions": {
                    "CreatePartition*": {
                        "Extend": FLAG,
                        "Order": NUMBER,
                        "Size": NUMBER,
                        "Type": re.compile("EFI|Extended|Logical|MSR|Primary"),
                    }
                },
                "ModifyPartitions": {
                    "ModifyPartition*": {
                        "Active": FLAG,
                        "Extend": FLAG,
                        "Format": re.compile("NTFS|FAT32"),
                        "Label": TEXT,
                        "Letter": re.compile("[C-Z]"),
                        "Order": NUMBER,
                        "PartitionID": NUMBER,
                        "TypeID": TEXT,
                    }
                },
            },
        },
        "ImageInstall": {
            "OSImage": {
                "InstallFrom": {
                    "MetaData*": {
                        "Key": re.compile("/IMAGE/(INDEX|NAME|DESCRIPTION)"),
                        "Value": TEXT,
                    },
                    "Path": TEXT,
                },
                "InstallTo": {"DiskID": NUMBER, "PartitionID": NUMBER},
                "InstallToAvailablePartition": FLAG,
                "WillShowUI": SHOW,
            }
        },
        "RunSynchronous": COMMANDS,
        "UserData": {
            "AcceptEula": FLAG,
            "FullName": TEXT,
            "Organization": TEXT,
            "ProductKey": {"Key": TEXT, "WillShowUI": SHOW},
        },
    },
    ("specialize", "Microsoft-Windows-Deployment"): {"RunSynchronous": COMMANDS},
    ("oobeSystem", "Microsoft-Windows-International-Core"): LOCALES,
    ("oobeSystem", "Microsoft-Windows-Shell-Setup"): {
        "OOBE": {
            **dict.fromkeys(
                (
                    "HideEULAPage",
                    "HideLocalAccountScreen",
                    "HideOEMRegistrationScreen",
                    "HideOnlineAccountScreens",
                    "HideWirelessSetupInOOBE",
                ),
                FLAG,
            ),
            "ProtectYourPC": re.compile("[123]"),
        },
        "UserAccounts": {
            "AdministratorPassword": PASSWORD,
            "LocalAccounts": {
                "LocalAccount*": {
                    "Description": TEXT,
                    "DisplayName": TEXT,
                    "Group": TEXT,
                    "Name": re.compile(r'[^"/\\\[\]:;|=,+*?<>@]{1,20}'),
                    "Password": PASSWORD,
                }
            },
        },
    },
}
PASSES = ["windowsPE", "specialize", "oobeSystem"]
"""In the order in which Setup goes through them."""


def bare(element: ET.Element) -> str:
    namespace, _, name = element.tag.rpartition("}")
    assert namespace == f"{{{NAMESPACE}"
    return name


def hold(element: ET.Element, schema: Schema) -> None:
    """See that an element has what it may have."""
    name = bare(element)
    if isinstance(schema, re.Pattern):
        assert len(element) == 0, name
        assert schema.fullmatch(element.text or ""), f"{name}: {element.text!r}"
        return
    seen: list[str] = []
    for child in element:
        tag = bare(child)
        of_list = f"{tag}*" in schema
        action = child.get("{http://schemas.microsoft.com/WMIConfig/2002/State}action")
        assert action == ("add" if of_list else None), tag
        assert of_list or tag not in seen, f"{tag} twice in {name}"
        seen.append(tag)
        found = schema.get(f"{tag}*") if of_list else schema.get(tag)
        assert found is not None, f"{tag} in {name} is nowhere in the reference"
        hold(child, found)
    assert seen, f"{name} is empty"
    orders = [order.text for order in element.findall("*/{*}Order")]
    assert orders == [str(number) for number in range(1, len(orders) + 1)]


def written(
    recipe: Recipe, *, virtio: bool = False, key: str | None = None, **settings: object
) -> ET.Element:
    assert recipe.windows is not None
    _, machine = describe_target(recipe, virtio=virtio)
    changed = VmConfig(**{f: getattr(machine, f) for f in machine.__slots__} | settings)
    return ET.fromstring(
        answer_file(recipe.windows, changed, Secrets(password="Pw-1", product_key=key))
    )


def commands(root: ET.Element, component: str) -> list[str]:
    found = root.findall(f"*/{{*}}component[@name='{component}']/{{*}}RunSynchronous/*/{{*}}Path")
    return [path.text or "" for path in found]


def test_the_recipes_are_those_that_are_meant() -> None:
    assert set(RECIPES) == {"win10", "win11", "server2022", "server2025"}
    firmwares = {name: recipe.target.get("firmware") for name, recipe in RECIPES.items()}
    assert {name for name, firmware in firmwares.items() if firmware == "uefi"} == {
        "win11",
        "server2025",
    }


@pytest.mark.parametrize("virtio", [False, True], ids=["plain", "virtio"])
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_the_reference_allows(name: str, virtio: bool) -> None:
    root = written(RECIPES[name], virtio=virtio, key=KEY)
    assert bare(root) == "unattend"
    assert [settings.get("pass") for settings in root] == PASSES
    for settings in root:
        assert bare(settings) == "settings"
        for component in settings:
            assert bare(component) == "component"
            assert component.get("processorArchitecture") == "amd64"
            assert component.get("publicKeyToken") == "31bf3856ad364e35"
            assert component.get("language") == "neutral"
            assert component.get("versionScope") == "nonSxS"
            hold(component, REFERENCE[settings.get("pass", ""), component.get("name", "")])


@pytest.mark.parametrize("name", RECIPES)
def test_windows_goes_to_the_partition_that_is_made_for_it(name: str) -> None:
    recipe = RECIPES[name]
    root = written(recipe)
    created = root.findall(".//{*}CreatePartition")
    kinds = [kind.text for kind in root.findall(".//{*}CreatePartition/{*}Type")]
    uefi = recipe.target["firmware"] == "uefi"
    assert kinds == (["EFI", "MSR", "Primary"] if uefi else ["Primary"])
    assert [part.findtext("{*}Extend") for part in created][-1] == "true"
    sizes = [int(part.findtext("{*}Size", "0")) for part in created[:-1]]
    assert sizes == ([260, 16] if uefi else [])
    to = root.findtext(".//{*}InstallTo/{*}PartitionID")
    assert to == str(len(created))
    (windows,) = [
        part
        for part in root.findall(".//{*}ModifyPartition")
        if part.findtext("{*}PartitionID") == to
    ]
    assert windows.findtext("{*}Format") == "NTFS"
    assert windows.findtext("{*}Active") == (None if uefi else "true")
    # "Microsoft Reserved (MSR) and Extended partitions cannot be modified."
    assert "MSR" not in {
        kinds[int(part.findtext("{*}PartitionID", "0")) - 1]
        for part in root.findall(".//{*}ModifyPartition")
    }


def test_an_edition_is_named_or_numbered(tmp_path: Path) -> None:
    from pytest_kdriver.targets.recipe import read_recipe

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.toml").write_text(
        '[windows]\nrelease="w10"\nedition="Windows 10 <Pro> & more"'
    )
    root = written(read_recipe(folder))
    assert root.findtext(".//{*}MetaData/{*}Key") == "/IMAGE/NAME"
    assert root.findtext(".//{*}MetaData/{*}Value") == "Windows 10 <Pro> & more"
    assert written(RECIPES["server2022"]).findtext(".//{*}MetaData/{*}Value") == "2"


def test_only_what_the_machine_has_not_is_bypassed_and_only_of_windows_11() -> None:
    setup = "Microsoft-Windows-Setup"

    def bypassed(name: str, **settings: object) -> list[str]:
        found = commands(written(RECIPES[name], **settings), setup)  # type: ignore[arg-type]
        assert all("LabConfig" in command for command in found)
        return [match[1] for c in found if (match := re.search(r"/v Bypass(\w+)Check ", c))]

    assert bypassed("win11") == ["SecureBoot"]
    assert bypassed("win11", tpm=False) == ["SecureBoot", "TPM"]
    assert bypassed("win11", memory=2048, cpus=1) == ["SecureBoot", "RAM", "CPU"]
    for name in ("win10", "server2022", "server2025"):
        assert bypassed(name, tpm=False, memory=1024) == []


@pytest.mark.parametrize(
    ("virtio", "port"), [(False, r"\\.\COM2"), (True, r"\\.\Global\kdriver.agent")]
)
def test_the_agent_becomes_a_service_with_its_port(virtio: bool, port: str) -> None:
    found = commands(written(RECIPES["win10"], virtio=virtio), "Microsoft-Windows-Deployment")
    assert found[0].startswith("cmd.exe /c for %d in (D E F G H) do if exist %d:\\kdagent.exe copy")
    assert found[1] == (
        'sc.exe create kdagent start= auto binPath= "C:\\Windows\\kdagent.exe --service kdagent '
        f'--end port {port}"'
    )


@pytest.mark.parametrize("virtio", [False, True])
def test_no_mouse_is_looked_for_where_the_agent_s_port_is(virtio: bool) -> None:
    """Its driver would take the port for itself: stackoverflow.com/questions/9226082 and many others."""
    found = commands(written(RECIPES["win11"], virtio=virtio), "Microsoft-Windows-Deployment")
    mice = [command for command in found if "sermouse" in command]
    expected = (
        r"reg.exe add HKLM\SYSTEM\CurrentControlSet\Services\sermouse /v Start /t REG_DWORD /d 4 /f"
    )
    assert mice == ([] if virtio else [expected])


def test_a_port_has_windows_name() -> None:
    assert agent_port("com4") == r"\\.\COM4"
    assert agent_port("virtio:kdriver.agent") == r"\\.\Global\kdriver.agent"


def test_a_server_is_told_its_administrator_s_password_and_a_client_is_not() -> None:
    path = ".//{*}AdministratorPassword/{*}Value"
    assert written(RECIPES["server2025"]).findtext(path) == "Pw-1"
    assert written(RECIPES["win11"]).findtext(path) is None
    assert written(RECIPES["win11"]).findtext(".//{*}LocalAccount/{*}Password/{*}Value") == "Pw-1"


def test_a_product_key_is_there_if_there_is_one() -> None:
    assert written(RECIPES["win10"], key=KEY).findtext(".//{*}ProductKey/{*}Key") == KEY
    assert written(RECIPES["win10"]).find(".//{*}ProductKey/{*}Key") is None


def test_nobody_logs_on_by_himself() -> None:
    for recipe in RECIPES.values():
        assert written(recipe).find(".//{*}AutoLogon") is None


def test_passwords_are_what_windows_asks_for_and_mean_nothing_to_anything() -> None:
    seen = {new_password() for _ in range(200)}
    assert len(seen) == 200
    for password in seen:
        assert re.fullmatch(r"[A-Za-z0-9_.+=-]{24}", password)
        for kind in ("[a-z]", "[A-Z]", "[0-9]", "[-_.+=]"):
            assert re.search(kind, password)


def test_secrets_do_not_show_themselves() -> None:
    assert "Pw-1" not in repr(Secrets(password="Pw-1", product_key=KEY))
    assert KEY not in repr(Secrets(password="Pw-1", product_key=KEY))
