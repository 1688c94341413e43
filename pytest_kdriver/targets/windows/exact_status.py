"""Whether what a DriverEntry returns comes back as it was: by a driver that returns what nobody else would.

NtLoadDriver's documentation does not say what becomes of DriverEntry's own status. Windows is said to give it
back, and a kernel that does not gives STATUS_FAILED_DRIVER_ENTRY, as ReactOS does (``IopLoadDriver``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pytest_kdriver.image.signing import SigningError
from pytest_kdriver.ntstatus import NTSTATUS
from pytest_kdriver.targets.target import CallTimeout, LoadOutcome, Target
from pytest_kdriver.targets.windows.in_force import Fact, NotInForce

RETURNED: Final = NTSTATUS(0xC0DE1234)
SERVICE: Final = "kdriver-proof"
TIMEOUT: Final = 60.0
"""Seconds for the whole of it, on a machine that is busy with its start."""

IMAGE: Final = Path(__file__).with_name("exact_status.bin")
"""``mov eax, 0xC0DE1234; ret``, as an image; the tests make it."""

_REASONS: Final[Mapping[int, str]] = {
    0xC0000365: "its kernel tells that a DriverEntry failed, and not by which status",
    0xC0000428: "its kernel takes no driver with a test signature: is test signing on?",
    0xC0000603: "its kernel blocks the driver, by a list of certificates or drivers",
    0xC000036B: "its kernel blocks the driver, by a policy",
    0xC000036C: "its kernel blocks the driver, by a policy",
}


def load_proof(target: Target, folder: Path) -> LoadOutcome:
    """Load the driver, and forget it; what came of it. ``folder`` is for its file.

    Raises what the target's ``install`` and ``load`` do. The image stays in the guest, to be found again.
    """
    image = folder / f"{SERVICE}.sys"
    shutil.copyfile(IMAGE, image)
    target.install(SERVICE, image, {}, TIMEOUT)
    try:
        return target.load(SERVICE, TIMEOUT)
    finally:
        target.uninstall(SERVICE, TIMEOUT)


def assert_exact_status(target: Target, folder: Path) -> list[Fact]:
    """See that the driver's status comes back as it was. ``NotInForce`` says what came instead.

    Where nothing can be signed here, it is not tried: that is the answer, and nothing that stops a test.
    """
    try:
        outcome = load_proof(target, folder)
    except SigningError as error:
        untried = Fact(
            name="exact status",
            found=f"not tried: {error}",
            in_force=False,
            needed=False,
            mends="pip install 'pytest-kdriver[signing]', apt-get install osslsigncode",
        )
        return [untried]
    except CallTimeout as timeout:
        raise NotInForce(
            f"a driver that does nothing but fail hangs there ({timeout.cut})", target=target.name
        ) from None
    if outcome.status != RETURNED:
        reason = _REASONS.get(int(outcome.status), "so no test can tell what its driver answered")
        raise NotInForce(
            f"a DriverEntry that returns {RETURNED} came back as {outcome.status}: {reason}",
            target=target.name,
        )
    return []
