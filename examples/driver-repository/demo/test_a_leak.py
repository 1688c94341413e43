"""What a leak looks like. This test FAILS, so it is not among the others: `pytest demo`."""

import pytest

from pytest_kdriver import ctl_code

CLEAR = ctl_code(0x801)


@pytest.mark.kdriver("mailbox", parameters={"Forget": 1})
def test_cleared_messages_are_freed(kdriver):
    with kdriver.running(), kdriver.device(r"\\.\Mailbox") as mailbox:
        for _ in range(3):
            mailbox.write(b"x" * 100)
        mailbox.ioctl(CLEAR)
