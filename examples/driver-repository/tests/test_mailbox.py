"""The driver mailbox: messages that wait in the kernel until somebody reads them."""

import pytest

from pytest_kdriver import NTSTATUS, DeviceError, ctl_code

MAILBOX = r"\\.\Mailbox"
COUNT = ctl_code(0x800)
CLEAR = ctl_code(0x801)

pytestmark = pytest.mark.kdriver("mailbox")


def count(device):
    return int.from_bytes(device.ioctl(COUNT, output_size=4), "little")


def test_starts_and_stops(kdriver):
    with kdriver.running():
        kdriver.dbgprint.expect("mailbox: room for 16 messages")
    kdriver.dbgprint.expect("mailbox: closed")


def test_starts_and_stops_again_and_again(kdriver):
    assert [cycle.leaked.total_count for cycle in kdriver.cycle(10)] == [0] * 10


def test_messages_come_out_as_they_went_in(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        mailbox.write(b"first")
        mailbox.write(b"")
        mailbox.write(bytes(range(256)))
        assert count(mailbox) == 3
        assert [mailbox.read(1000) for _ in range(3)] == [b"first", b"", bytes(range(256))]
        assert count(mailbox) == 0


def test_a_message_stays_until_there_is_room_for_it(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        mailbox.write(b"a long message")
        with pytest.raises(DeviceError) as error:
            mailbox.read(6)
        assert error.value.status == NTSTATUS.STATUS_BUFFER_TOO_SMALL
        assert mailbox.read(100) == b"a long message"


def test_there_is_nothing_to_read_in_an_empty_mailbox(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        with pytest.raises(DeviceError) as error:
            mailbox.read(100)
        assert error.value.status == NTSTATUS.STATUS_NO_MORE_ENTRIES


@pytest.mark.kdriver(parameters={"Capacity": 2})
def test_a_full_mailbox_refuses_and_keeps_what_it_has(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        mailbox.write(b"one")
        mailbox.write(b"two")
        with pytest.raises(DeviceError) as error:
            mailbox.write(b"three")
        assert error.value.status == NTSTATUS.STATUS_DEVICE_BUSY
        assert [mailbox.read(100) for _ in range(2)] == [b"one", b"two"]


def test_the_mailbox_is_shared_by_all_who_have_it_open(kdriver):
    with (
        kdriver.running(),
        kdriver.device(MAILBOX) as alice,
        kdriver.device(MAILBOX) as bob,
    ):
        alice.write(b"hello, bob")
        assert bob.read(100) == b"hello, bob"


def test_unread_messages_are_freed_with_the_driver(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        mailbox.write(b"x" * 1000)
        mailbox.write(b"x" * 1000)
        assert kdriver.pool.in_use.total_size >= 2000
    assert not kdriver.pool.leaked  # without this line, too, a leak would fail the test


def test_cleared_messages_are_freed_at_once(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        before = kdriver.pool.in_use.total_size
        mailbox.write(b"x" * 1000)
        mailbox.ioctl(CLEAR)
        assert count(mailbox) == 0
        assert kdriver.pool.in_use.total_size == before


@pytest.mark.kdriver(parameters={"Capacity": 0})
def test_a_mailbox_for_nothing_does_not_start(kdriver):
    assert kdriver.start(check=False) == NTSTATUS.STATUS_INVALID_PARAMETER
    kdriver.dbgprint.expect("a mailbox of 0 messages can't be had")


@pytest.mark.kdriver(parameters={"Capacity": "many"})
def test_a_parameter_of_the_wrong_type_is_refused(kdriver):
    assert kdriver.start(check=False) == NTSTATUS.STATUS_OBJECT_TYPE_MISMATCH


def test_unknown_control_codes_are_refused(kdriver):
    with kdriver.running(), kdriver.device(MAILBOX) as mailbox:
        with pytest.raises(DeviceError) as error:
            mailbox.ioctl(ctl_code(0x8FF))
        assert error.value.status == NTSTATUS.STATUS_INVALID_DEVICE_REQUEST
