"""The agent's protocol: the host's codec by itself, and held against the agent's own."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.errors import AgentProtocolError
from pytest_kdriver.guest import messages
from pytest_kdriver.guest.frames import (
    HEADER_SIZE,
    MAX_BODY,
    MAX_FRAME,
    Decoder,
    Frame,
    Kind,
    encode,
)
from pytest_kdriver.guest.wire import Message, from_bytes, to_bytes
from pytest_kdriver.port_stream import Decoder as PortDecoder
from pytest_kdriver.port_stream import Lost, Mark, MarkKind, encode_mark, encode_payload

WORKSPACE = Path(__file__).parents[2] / "vm"
ALL_BYTES = bytes(range(256))

frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    operation=st.integers(0, 0xFFFF),
    request=st.integers(0, 0xFFFFFFFF),
    body=st.binary(max_size=300),
)


def frame(body: bytes = b"") -> Frame:
    return Frame(kind=Kind.REPLY, operation=6, request=1, body=body)


def decode(data: bytes) -> tuple[list[Frame], str | None]:
    """All frames of a stream, and the error that ends it."""
    decoder = Decoder()
    decoded = []
    try:
        while new := decoder.receive_data(data):
            decoded += new
            data = b""
    except AgentProtocolError as error:
        return decoded, str(error)
    return decoded, None


class TestFrames:
    @given(st.lists(frames, max_size=4), st.data())
    def test_come_back_however_the_stream_is_cut(
        self, sent: list[Frame], data: st.DataObject
    ) -> None:
        stream = b"".join(map(encode, sent))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
        decoder = Decoder()
        received = [
            frame
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
            for frame in decoder.receive_data(stream[start:end])
        ]
        assert received == sent

    def test_come_back_cut_at_every_border(self) -> None:
        sent = [frame(ALL_BYTES), frame(), frame(b"\n")]
        stream = b"".join(map(encode, sent))
        for cut in range(len(stream) + 1):
            decoder = Decoder()
            assert decoder.receive_data(stream[:cut]) + decoder.receive_data(stream[cut:]) == sent

    def test_may_be_as_long_as_the_limit_and_no_longer(self) -> None:
        longest = frame(b"x" * MAX_BODY)
        assert decode(encode(longest)) == ([longest], None)
        with pytest.raises(ValueError, match="fit into a frame"):
            encode(frame(b"x" * (MAX_BODY + 1)))

    @pytest.mark.parametrize("length", [0, HEADER_SIZE - 1, MAX_FRAME + 1, 0xFFFFFFFF])
    def test_of_an_impossible_length_are_refused_at_once(self, length: int) -> None:
        with pytest.raises(AgentProtocolError, match=f"a frame of {length} bytes"):
            Decoder().receive_data(struct.pack("<I", length))

    def test_of_another_version_are_refused(self) -> None:
        with pytest.raises(AgentProtocolError, match="version 2; this side speaks 1"):
            Decoder().receive_data(struct.pack("<IBBHI", 8, 2, 1, 1, 1))

    def test_of_no_kind_are_refused(self) -> None:
        with pytest.raises(AgentProtocolError, match="kind 9"):
            Decoder().receive_data(struct.pack("<IBBHI", 8, 1, 9, 1, 1))

    def test_before_a_broken_one_are_given_and_then_the_error_stays(self) -> None:
        decoder = Decoder()
        assert decoder.receive_data(encode(frame()) + b"Hello, this is a shell") == [frame()]
        for data in (b"", encode(frame())):
            with pytest.raises(AgentProtocolError, match="Hello"):
                decoder.receive_data(data)

    @given(st.binary(max_size=200))
    def test_garbage_makes_frames_or_an_error(self, garbage: bytes) -> None:
        decoded, _ = decode(garbage)
        assert b"".join(map(encode, decoded)) == garbage[: sum(12 + len(f.body) for f in decoded)]


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values for one type of field, or messages of one class."""
    if get_origin(kind) is Annotated:
        return st.integers(0, 256 ** get_args(kind)[1].size - 1)
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=3).map(tuple)
    if get_origin(kind) in {Union, types.UnionType}:
        return st.none() | values(get_args(kind)[0])
    if kind is bytes:
        return st.binary(max_size=20)
    if kind is str:
        return st.text(max_size=10)
    if kind is bool:
        return st.booleans()
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})


ALL_MESSAGES: list[type[Message]] = [
    messages.Error,
    *(operation.request for operation in messages.OPERATIONS),
    *(operation.reply for operation in messages.OPERATIONS),
]


class TestMessages:
    @given(st.one_of(*(values(kind) for kind in ALL_MESSAGES)))
    def test_come_back(self, message: Message) -> None:
        assert from_bytes(type(message), to_bytes(message)) == message

    @given(st.sampled_from(ALL_MESSAGES), st.binary(max_size=60))
    def test_garbage_is_a_message_or_an_error(self, kind: type[Message], garbage: bytes) -> None:
        with suppress(AgentProtocolError):
            assert to_bytes(from_bytes(kind, garbage)) == garbage

    def test_that_do_not_fit_their_fields_are_refused(self) -> None:
        with pytest.raises(ValueError, match="can't be sent"):
            to_bytes(messages.WaitProcess(pid=-1))
        with pytest.raises(ValueError, match="can't be sent"):
            to_bytes(messages.Fence(cookie="\ud800"))

    def test_each_operation_has_its_own_number_name_and_request(self) -> None:
        operations = messages.OPERATIONS
        for key in ("number", "name", "request"):
            assert len({getattr(operation, key) for operation in operations}) == len(operations)


STREAM, REQUEST, REPLY, PORT = range(4)
Case = tuple[int, int, bytes]
Verdict = tuple[bool, bytes]


@pytest.fixture(scope="module")
def agent_codec(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Case]], list[Verdict]]:
    """The agent's codec, as a function: whether it takes each case, and how it writes it anew."""
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("cargo is not installed")
    target = tmp_path_factory.mktemp("frames")
    build = ["build", "--quiet", "--locked", "--package=frames", "--example=echo"]
    where = [f"--manifest-path={WORKSPACE / 'Cargo.toml'}", f"--target-dir={target}"]
    subprocess.run([cargo, *build, *where], check=True)

    def run(cases: list[Case]) -> list[Verdict]:
        records = (struct.pack("<BHI", w, o, len(data)) + data for w, o, data in cases)
        done = subprocess.run(
            [target / "debug" / "examples" / "echo"],
            input=b"".join(records),
            capture_output=True,
            check=True,
        )
        return list(_verdicts(done.stdout))

    return run


def _verdicts(output: bytes) -> list[Verdict]:
    verdicts = []
    offset = 0
    while offset < len(output):
        accepted, length = struct.unpack_from("<?I", output, offset)
        offset += 5
        verdicts.append((accepted, output[offset : offset + length]))
        offset += length
    return verdicts


def our_verdict(case: Case) -> Verdict:
    what, number, data = case
    if what == STREAM:
        decoded, error = decode(data)
        return error is None, b"".join(map(encode, decoded))
    if what == PORT:
        return True, echo_port(data, number)
    operation = next((o for o in messages.OPERATIONS if o.number == number), None)
    if operation is None:
        return False, b""
    kind: type[Message] = operation.request if what == REQUEST else operation.reply
    try:
        return True, to_bytes(from_bytes(kind, data))
    except AgentProtocolError:
        return False, b""


def echo_port(data: bytes, piece: int) -> bytes:
    """What a guest would send that answers each mark and sends all payload back."""
    decoder = PortDecoder(MarkKind.SYNC)
    out = []
    for start in range(0, len(data), piece):
        for event in decoder.receive_data(data[start : start + piece]):
            match event:
                case Mark(_, nonce):
                    out.append(encode_mark(MarkKind.ANSWER, nonce))
                case bytes():
                    out.append(encode_payload(event))
                case Lost():
                    pass
    return b"".join(out)


class Generator:
    """Random cases, good and mutated, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, kind: Any) -> Any:
        choose = self.random
        if get_origin(kind) is Annotated:
            limit = 256 ** get_args(kind)[1].size
            return choose.choice([0, 1, limit - 1, choose.randrange(limit)])
        if get_origin(kind) is tuple:
            return tuple(self.value(get_args(kind)[0]) for _ in range(choose.randrange(4)))
        if get_origin(kind) in {Union, types.UnionType}:
            return None if choose.random() < 0.5 else self.value(get_args(kind)[0])
        if kind is bytes:
            return choose.randbytes(choose.randrange(30))
        if kind is str:
            return "".join(choose.choices("a\\\0ü€😀", k=choose.randrange(8)))
        if kind is bool:
            return choose.random() < 0.5
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{field.name: self.value(hints[field.name]) for field in fields(kind)})

    def case(self) -> Case:
        what = self.random.choice([STREAM, REQUEST, REPLY])
        operation = self.random.choice(messages.OPERATIONS)
        if what == STREAM:
            data = b"".join(map(encode, self.frames()))
        else:
            kind = operation.request if what == REQUEST else operation.reply
            data = to_bytes(cast("Message", self.value(kind)))
        number = self.random.choice([*[operation.number] * 20, 0, 99, 0xFFFF])
        return what, number, data if self.random.random() < 0.3 else self.mutate(data)

    def port_case(self) -> Case:
        pieces = [
            self.random.choice(
                [
                    encode_mark(MarkKind.SYNC, self.random.randbytes(16).hex()),
                    encode_payload(bytes(self.random.choices(b"}~]^Sa\0", k=5))),
                    bytes(self.random.choices(b"}~]^Sa\0", k=2)),
                ]
            )
            for _ in range(self.random.randrange(8))
        ]
        data = encode_mark(MarkKind.SYNC, "0" * 32) + b"".join(pieces)
        piece = self.random.randrange(1, 50)
        return PORT, piece, data if self.random.random() < 0.3 else self.mutate(data)

    def frames(self) -> list[Frame]:
        return [
            Frame(
                kind=self.random.choice(list(Kind)),
                operation=self.random.randrange(1 << 16),
                request=self.random.randrange(1 << 32),
                body=self.random.randbytes(self.random.randrange(20)),
            )
            for _ in range(self.random.randrange(5))
        ]

    def mutate(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(changed) + 1)
            match self.random.randrange(5):
                case 0:
                    changed[at:] = b""
                case 1:
                    changed[at:at] = self.random.randbytes(self.random.randrange(1, 5))
                case 2:
                    changed[at : at + 1] = b""
                case 3:
                    changed[at : at + 1] = self.random.choice([b"\0", b"\1", b"\x7f", b"\xff"])
                case _:
                    changed[at : at + 4] = struct.pack("<I", self.random.randrange(30))
        return bytes(changed)


def test_both_codecs_agree_on_thousands_of_good_and_broken_cases(
    agent_codec: Callable[[list[Case]], list[Verdict]],
) -> None:
    generator = Generator(seed=1)
    cases = [generator.case() for _ in range(20_000)]
    theirs = agent_codec(cases)
    ours = [our_verdict(case) for case in cases]
    assert len(theirs) == len(cases)
    differ = [(case, o, t) for case, o, t in zip(cases, ours, theirs, strict=True) if o != t]
    assert differ == []
    for what in (STREAM, REQUEST, REPLY):
        accepted = [o[0] for case, o in zip(cases, ours, strict=True) if case[0] == what]
        assert 0.2 < sum(accepted) / len(accepted) < 0.8, "the cases test one side only"


def test_both_codecs_agree_on_thousands_of_good_and_broken_port_streams(
    agent_codec: Callable[[list[Case]], list[Verdict]],
) -> None:
    generator = Generator(seed=2)
    cases = [generator.port_case() for _ in range(20_000)]
    theirs = agent_codec(cases)
    differ = [
        (case, ours, its)
        for case, its in zip(cases, theirs, strict=True)
        if (ours := our_verdict(case)) != its
    ]
    assert differ == []
    broken = sum(
        any(isinstance(event, Lost) for event in PortDecoder(MarkKind.SYNC).receive_data(data))
        for _, _, data in cases
    )
    assert 0.2 < broken / len(cases) < 0.8, "the cases test one side only"
