"""KD packets, by the layouts of the documents."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.kernel.sources.kd.known_images import MOST_IMAGES, KnownImages, stem
from pytest_kdriver.kernel.sources.kd.machines import ARM64, X64, Machine
from pytest_kdriver.kernel.sources.kd.packets import (
    MOST_PAYLOAD,
    Api,
    ControlPacket,
    DamagedPacket,
    DataPacket,
    DebugIo,
    ExceptionRecord,
    Packet,
    PacketReader,
    Reply,
    Request,
    StateChange,
    Symbols,
    Version,
    answer_to,
    answer_to_control_request,
    control_packet,
    data_packet,
    memory_in,
    read_command,
    read_debug_io,
    read_exception,
    read_memory,
    read_reply,
    read_state_change,
    read_symbols,
    read_version,
    refusal_of_file,
    set_context,
    set_context_part,
)

IDS = st.sampled_from([0x80800000, 0x80800001, 0x80800800])
DATA = st.builds(
    DataPacket, st.sampled_from([2, 3, 7, 9, 10, 11]), IDS, st.binary(max_size=MOST_PAYLOAD)
)
CONTROL = st.builds(ControlPacket, st.sampled_from([4, 5, 6]), IDS | st.just(0))
PACKETS = st.lists(DATA | CONTROL, max_size=6)
NOISE = st.binary(max_size=30).filter(lambda noise: not {*b"0i"} & {*noise})


def encoded(packet: DataPacket | ControlPacket) -> bytes:
    return data_packet(*packet) if isinstance(packet, DataPacket) else control_packet(*packet)


def read(*pieces: bytes) -> list[Packet]:
    reader = PacketReader()
    return [packet for piece in pieces for packet in reader.receive(piece)]


def state_change(kind: int = 0x3030, counter: int = 0, size: int = 240) -> bytearray:
    payload = bytearray(size)
    struct.pack_into("<IHHI", payload, 0, kind, 15, 2, 4)
    struct.pack_into("<QQ", payload, 16, 0xFFFFA80000001000, counter)
    return payload


def change_of(payload: bytes | bytearray) -> StateChange:
    change = read_state_change(bytes(payload))
    assert change is not None
    return change


class TestTheFrame:
    def test_control_packets_are_a_header_alone(self) -> None:
        assert control_packet(4, 0x80800001) == bytes.fromhex(
            "69696969 0400 0000 01008080 00000000"
        )
        assert control_packet(6) == bytes.fromhex("69696969 0600 0000 00000000 00000000")

    def test_data_packets_have_a_sum_and_end_with_aa(self) -> None:
        assert data_packet(3, 0x80800800, b"\x01\xff") == bytes.fromhex(
            "30303030 0300 0200 00088080 00010000 01ff aa"
        )

    @given(PACKETS)
    def test_what_is_encoded_is_read_again(self, packets: list[DataPacket | ControlPacket]) -> None:
        assert read(b"".join(map(encoded, packets))) == packets

    @given(DATA, CONTROL)
    def test_a_cut_at_any_byte_changes_nothing(
        self, data: DataPacket, control: ControlPacket
    ) -> None:
        stream = encoded(data) + encoded(control)
        for cut in range(len(stream)) if len(stream) < 300 else range(0, len(stream), 97):
            assert read(stream[:cut], stream[cut:]) == [data, control]

    @given(PACKETS, NOISE)
    def test_garbage_between_packets_is_skipped_and_counted(
        self, packets: list[DataPacket | ControlPacket], noise: bytes
    ) -> None:
        reader = PacketReader()
        found = list(reader.receive(noise + noise.join(map(encoded, packets)) + noise))
        assert found == packets
        assert reader.skipped == len(noise) * (len(packets) + 1 if packets else 2)

    @pytest.mark.parametrize(
        "garbage", [b"0", b"00", b"000", b"i", b"iii", b"0000", b"iiii0", b"b0000i"]
    )
    def test_pieces_of_a_leader_in_front_of_a_packet_do_not_hide_it(self, garbage: bytes) -> None:
        packet = DataPacket(3, 0x80800000, b"text")
        assert read(garbage + encoded(packet)) == [packet]
        assert read(garbage, *(bytes([byte]) for byte in encoded(packet))) == [packet]

    @given(DATA, st.data())
    def test_a_flipped_bit_in_the_payload_is_seen_and_the_next_packet_found(
        self, packet: DataPacket, data: st.DataObject
    ) -> None:
        stream = bytearray(encoded(packet))
        at = data.draw(st.integers(16, len(stream) - 1))
        stream[at] ^= 1 << data.draw(st.integers(0, 7))
        following = ControlPacket(4, 0x80800000)
        assert read(bytes(stream) + encoded(following))[-1] == following
        assert packet not in read(bytes(stream))
        assert DamagedPacket() in read(bytes(stream))

    @given(st.binary(min_size=1, max_size=600), st.data())
    def test_a_packet_that_lost_bytes_does_not_swallow_its_repetition(
        self, payload: bytes, data: st.DataObject
    ) -> None:
        packet = DataPacket(3, 0x80800001, payload)
        whole = encoded(packet)
        at = data.draw(st.integers(16, len(whole) - 1))
        size = data.draw(st.integers(1, len(whole) - at))
        assert read(whole[:at] + whole[at + size :] + whole)[-1] == packet

    @pytest.mark.parametrize(
        "header",
        [
            struct.pack("<IHHII", 0x30303030, 3, 4001, 0x80800000, 0),
            struct.pack("<IHHII", 0x30303030, 12, 0, 0x80800000, 0),
            struct.pack("<IHHII", 0x30303030, 4, 0, 0x80800000, 0),
            struct.pack("<IHHII", 0x30303030, 3, 0, 0x80800002, 0),
            struct.pack("<IHHII", 0x69696969, 3, 0, 0x80800000, 0),
            struct.pack("<IHHII", 0x69696969, 4, 1, 0x80800000, 0),
            struct.pack("<IHHII", 0x69696969, 4, 0, 0x80800000, 1),
        ],
    )
    def test_a_header_that_cannot_be_is_none(self, header: bytes) -> None:
        packet = ControlPacket(5, 0)
        assert read(header + encoded(packet)) == [packet]

    @given(st.lists(st.binary(max_size=200) | DATA.map(lambda packet: encoded(packet)[:-1])))
    def test_whatever_comes_no_more_than_one_packet_is_held(self, pieces: list[bytes]) -> None:
        reader = PacketReader()
        for piece in pieces:
            list(reader.receive(piece))
            assert len(reader._buffer) <= 16 + MOST_PAYLOAD

    def test_behind_the_beginning_of_a_packet_that_is_given_up_on_others_are_found(self) -> None:
        reader = PacketReader()
        good = DataPacket(3, 0x80800000, b"good")
        list(reader.receive(data_packet(3, 0x80800001, bytes(300))[:40] + encoded(good)))
        assert reader.is_within_packet
        assert list(reader.give_up()) == [good]
        assert not reader.is_within_packet


class TestWhatAKernelSays:
    def test_a_print(self) -> None:
        payload = bytes.fromhex("30320000 0f00 0100 05000000 00000000") + b"hello"
        assert read_debug_io(payload) == DebugIo(0x3230, 15, 1, b"hello", 0)

    def test_a_prompt_and_its_answer_which_is_cut_to_what_has_room(self) -> None:
        prompt = read_debug_io(bytes.fromhex("31320000 0f00 0100 02000000 02000000") + b"? ")
        assert prompt == DebugIo(0x3231, 15, 1, b"? ", 2)
        assert answer_to(prompt, b"often") == (
            bytes.fromhex("31320000 0f00 0100 00000000 02000000") + b"of"
        )

    def test_a_file_is_refused_with_its_api_and_a_status(self) -> None:
        request = struct.pack("<I", 0x3430) + bytes(60) + "demo.sys".encode("utf-16-le")
        assert refusal_of_file(request) == bytes.fromhex("30340000 010000c0") + bytes(56)

    def test_a_debug_register_is_not_available_and_is_taken_back(self) -> None:
        assert answer_to_control_request(struct.pack("<III", 0x4300, 3, 1)) == struct.pack(
            "<III", 0x4300, 3, 0
        )
        assert answer_to_control_request(struct.pack("<III", 0x4301, 3, 0)) == struct.pack(
            "<III", 0x4301, 3, 1
        )

    def test_an_exception(self) -> None:
        payload = state_change(0x3030, 0xFFFFF80312345678)
        struct.pack_into("<II", payload, 32, 0xC0000005, 0)
        struct.pack_into("<QI", payload, 48, 0xFFFFF80312345678, 2)
        struct.pack_into("<QQQ", payload, 64, 1, 0xDEAD0000, 77)
        change = change_of(payload)
        assert change[:4] == (0x3030, 2, 4, 0xFFFFF80312345678)
        assert read_exception(change) == ExceptionRecord(
            0xC0000005, 0xFFFFF80312345678, (1, 0xDEAD0000), False
        )
        struct.pack_into("<I", payload, 184, 1)
        assert read_exception(change_of(payload)).is_first_chance

    @pytest.mark.parametrize("extra", [0, 4])
    def test_an_image_also_behind_the_longer_header_of_some_stubs(self, extra: int) -> None:
        path = b"\\SystemRoot\\System32\\drivers\\demo.sys\0"
        payload = state_change(0x3031) + bytes(extra) + path
        struct.pack_into("<I", payload, 32, len(path))
        struct.pack_into("<Q", payload, 40, 0xFFFFF80340000000)
        struct.pack_into("<II", payload, 56, 0x1234, 0x8000)
        assert read_symbols(change_of(payload)) == Symbols(
            0xFFFFF80340000000, 0x8000, path[:-1], False
        )
        payload[64] = 1
        assert read_symbols(change_of(payload)).is_unload

    def test_a_command_and_a_state_from_an_alternate_source(self) -> None:
        change = change_of(state_change(0x13032) + b"echo\0hello\0")
        assert change.kind == 0x3032
        assert read_command(change) == [b"echo", b"hello"]

    def test_what_is_too_short_says_nothing(self) -> None:
        assert read_debug_io(bytes(15)) is None
        assert read_state_change(bytes(239)) is None
        assert read_reply(bytes(55)) is None

    @given(st.binary(min_size=240, max_size=500))
    def test_no_stop_can_make_its_readers_fail(self, payload: bytes) -> None:
        change = change_of(payload)
        for reader in (read_exception, read_symbols, read_command):
            reader(change)
        for machine in (X64, ARM64):
            assert len(machine.instructions_at(change)) <= 16
            assert len(machine.go_on(change, 0).payload()) == 56

    @given(st.binary(max_size=200))
    def test_no_question_can_make_its_answer_fail_or_long(self, payload: bytes) -> None:
        assert len(refusal_of_file(payload)) == 64
        assert len(answer_to_control_request(payload)) == 12
        prompt = read_debug_io(payload)
        if prompt is not None:
            assert len(answer_to(prompt, b"x" * 5000)) <= MOST_PAYLOAD


class TestWhatItIsAsked:
    def test_to_go_on_with_dr7_as_it_was(self) -> None:
        payload = state_change()
        struct.pack_into("<Q", payload, 200, 0x455)
        request = X64.go_on(change_of(payload), 0x00010002).payload()
        assert request == (
            bytes.fromhex("3c310000 0000 0200 00000000 00000000")
            + struct.pack("<IIQQQ", 0x00010002, 0, 0x455, 0, 0)
            + bytes(8)
        )

    def test_an_arm64_kernel_has_no_dr7(self) -> None:
        payload = state_change()
        payload[192:240] = b"\xff" * 48
        request = ARM64.go_on(change_of(payload), 0x00010002).payload()
        assert request[16:] == struct.pack("<I", 0x00010002) + bytes(36)

    def test_for_memory_and_what_comes_back_also_where_it_is_less(self) -> None:
        assert read_memory(1, 0xFFFFF80012345678, 16).payload() == (
            bytes.fromhex("30310000 0000 0100 00000000 00000000")
            + struct.pack("<QII", 0xFFFFF80012345678, 16, 0)
            + bytes(24)
        )
        reply = read_reply(
            struct.pack("<IHHI4xQII24x", 0x3130, 0, 1, 0xC0000001, 0x1000, 16, 3) + b"abcdef"
        )
        assert reply is not None
        assert not reply.is_success
        assert memory_in(reply, 0x1000) == b"abc"
        assert memory_in(reply, 0x2000) == b""

    def test_to_take_a_context_whole_or_in_parts(self) -> None:
        context = bytes(range(256)) * 4 + bytes(208)
        whole = set_context(1, context, 0x10001F).payload()
        assert whole[:20] == bytes.fromhex("33310000 0000 0100 00000000 00000000 1f001000")
        assert whole[56:] == context
        parts = [set_context_part(1, context, offset) for offset in (0, 512, 1024)]
        assert b"".join(part.data for part in parts) == context
        assert [struct.unpack("<III", part.fields) for part in parts] == [
            (0, 512, 1232),
            (512, 512, 1232),
            (1024, 208, 1232),
        ]

    def test_what_kernel_it_is(self) -> None:
        fields = struct.pack(
            "<HHBBHHBBBBHQQQ", 15, 19041, 6, 2, 0x47, 0x8664, 12, 3, 49, 0, 0, 1 << 63, 2, 3
        )
        reply = Reply(Api.GET_VERSION, 0, 0, fields, b"")
        assert read_version(reply) == Version(19041, 0x8664, 1 << 63, 3)

    @given(st.binary(min_size=56, max_size=100))
    def test_no_reply_can_make_its_readers_fail(self, payload: bytes) -> None:
        reply = read_reply(payload)
        assert reply is not None
        read_version(reply)
        assert len(memory_in(reply, 0)) <= len(reply.data)

    def test_nothing_is_asked_for_that_is_longer_than_a_packet(self) -> None:
        assert (
            len(Request(Api.SET_CONTEXT, 0, b"", bytes(X64.context_size)).payload()) < MOST_PAYLOAD
        )


class TestMachines:
    @pytest.mark.parametrize(
        ("code", "length"), [(b"\xcc\xc3", 1), (b"\xcd\x2c\x90", 2), (b"\xcd\x2d", 0), (b"", 0)]
    )
    def test_x64s_traps(self, code: bytes, length: int) -> None:
        assert X64.length_of_trap(code) == length

    def test_arm64s_trap_is_brk_f000(self) -> None:
        assert ARM64.length_of_trap((0xD43E0000).to_bytes(4, "little")) == 4
        assert ARM64.length_of_trap(b"\xcc\xcc\xcc\xcc") == 0

    def test_the_instructions_stand_where_each_machines_report_has_them(self) -> None:
        payload = state_change()
        struct.pack_into("<QQIHH16s", payload, 192, 0, 0x400, 0x82, 2, 3, b"\xcc\xc3")
        assert X64.instructions_at(change_of(payload)) == b"\xcc\xc3"
        payload = state_change()
        struct.pack_into("<QQI16s", payload, 192, 0, 0, 16, b"\0\0\x3e\xd4" * 4)
        assert ARM64.instructions_at(change_of(payload)) == b"\0\0\x3e\xd4" * 4

    @given(st.sampled_from([X64, ARM64]), st.integers(0, (1 << 64) - 1))
    def test_only_the_program_counter_is_changed(self, machine: Machine, value: int) -> None:
        context = bytes(range(256)) * 5
        stepped = machine.with_program_counter(context, value)
        assert machine.register(stepped, machine.program_counter) == value
        changed = [at for at in range(len(context)) if stepped[at] != context[at]]
        assert all(0 <= at - machine.program_counter < 8 for at in changed)
        assert len(stepped) == len(context)


class TestKnownImages:
    @pytest.mark.parametrize(
        ("path", "name"),
        [
            (r"\SystemRoot\System32\drivers\Demo.sys", "Demo"),
            (r"\??\C:\kdriver\a.b.sys", "a.b"),
            (r"multi(0)disk(0)cdrom(96)\reactos\system32\hal.dll", "hal"),
            ("noext", "noext"),
            (".sys", ".sys"),
            ("", ""),
        ],
    )
    def test_a_driver_is_the_stem_of_its_files_name(self, path: str, name: str) -> None:
        assert stem(path) == name

    def test_an_address_belongs_to_the_image_that_holds_it(self) -> None:
        images = KnownImages()
        images.load(0x1000, 0x1000, "a.sys")
        images.load(0x4000, 0x1000, "ntoskrnl.exe")
        assert [images.driver_at(at) for at in (0xFFF, 0x1000, 0x1FFF, 0x2000)] == [
            None, "a", "a", None,
        ]  # fmt: skip
        assert images.at(0x4000) is not None
        assert images.driver_at(0x4000) is None  # the kernel stands for somebody who called

    def test_what_is_loaded_takes_the_place_of_what_lay_there(self) -> None:
        images = KnownImages()
        for base in (0x1000, 0x2000, 0x3000, 0x5000):
            images.load(base, 0x1000, f"{base:x}.sys")
        images.load(0x1800, 0x2000, "new.sys")
        assert [images.driver_at(at) for at in (0x1000, 0x1800, 0x37FF, 0x3800, 0x5000)] == [
            None, "new", "new", None, "5000",
        ]  # fmt: skip

    @given(
        st.lists(
            st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 8)),
            max_size=40,
        )
    )
    def test_they_never_overlap(self, steps: list[tuple[bool, int, int]]) -> None:
        images = KnownImages()
        lies: dict[int, str] = {}
        for number, (is_load, base, size) in enumerate(steps):
            if is_load and size:
                image = images.load(base, size, f"{number}.sys")
                overlapped = {name for at, name in lies.items() if base <= at < base + size}
                lies = {at: name for at, name in lies.items() if name not in overlapped}
                lies |= dict.fromkeys(range(base, base + size), image.driver)
            elif not is_load and (gone := images.unload(base)) is not None:
                lies = {at: name for at, name in lies.items() if name != gone.driver}
        assert {at: name for at in range(40) if (name := images.driver_at(at))} == lies

    def test_their_number_is_bounded(self) -> None:
        images = KnownImages()
        for number in range(MOST_IMAGES + 10):
            images.load(number * 16, 16, f"{number}.sys")
        assert len(images) == MOST_IMAGES
        assert images.at(0) is None
