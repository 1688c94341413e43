"""The layer below a port's frames. ``test_frames`` holds its codec against the agent's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kdriver.port_stream import (
    Decoder,
    HostStream,
    Lost,
    Mark,
    MarkKind,
    encode_mark,
    encode_payload,
    new_nonce,
)

ALL_BYTES = bytes(range(256))
ONE, TWO = "1" * 32, "2" * 32
ANSWER = encode_mark(MarkKind.ANSWER, ONE)
BOOT = encode_mark(MarkKind.BOOT, TWO)

# Bytes among which those that mean something are frequent.
hostile = st.lists(
    st.sampled_from([b"}", b"~", b"]", b"^", b"A", b"B", b"S", b"0", b"f" * 32, ANSWER, b"x"]),
    max_size=30,
).map(b"".join)


def pieces(stream: bytes, data: st.DataObject) -> list[bytes]:
    """The stream, cut anywhere."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def joined(events: Sequence[bytes | Mark | Lost]) -> list[bytes | Mark | Lost]:
    """The same with adjacent payload as one."""
    out: list[bytes | Mark | Lost] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, bytes) and isinstance(last, bytes):
            out[-1] = last + event
        else:
            out.append(event)
    return out


def synced() -> HostStream:
    stream = HostStream()
    stream.begin(ONE)
    assert stream.receive_data(ANSWER) == b""
    assert stream.synced
    return stream


class TestEncoding:
    @given(st.binary())
    def test_of_payload_has_no_flag(self, data: bytes) -> None:
        assert b"~" not in encode_payload(data)

    def test_of_marks_is_their_kind_and_their_nonce(self) -> None:
        nonce = "0123456789abcdef0011223344556677"
        assert encode_mark(MarkKind.SYNC, nonce) == b"~~S0123456789abcdef0011223344556677~"

    @pytest.mark.parametrize("nonce", ["", "1" * 31, "1" * 33, "A" * 32, "é" * 32])
    def test_of_other_nonces_is_refused(self, nonce: str) -> None:
        with pytest.raises(ValueError, match="is no nonce"):
            encode_mark(MarkKind.SYNC, nonce)

    def test_of_new_nonces_is_possible_and_each_is_another(self) -> None:
        nonces = {new_nonce() for _ in range(100)}
        assert len({encode_mark(MarkKind.BOOT, nonce) for nonce in nonces}) == 100


class TestDecoding:
    @given(st.lists(st.binary() | st.sampled_from([ANSWER, BOOT])), st.data())
    def test_gives_what_was_sent_however_it_is_cut(
        self, sent: list[bytes], data: st.DataObject
    ) -> None:
        marks = {ANSWER: Mark(MarkKind.ANSWER, ONE), BOOT: Mark(MarkKind.BOOT, TWO)}
        stream = ANSWER + b"".join(s if s in marks else encode_payload(s) for s in sent)
        decoder = Decoder(MarkKind.ANSWER, MarkKind.BOOT)
        received = [
            event for piece in pieces(stream, data) for event in decoder.receive_data(piece)
        ]
        expected = [marks.get(s, s) for s in [ANSWER, *sent] if s]
        assert joined(received) == joined(expected)

    @given(hostile, st.data())
    def test_of_anything_is_the_same_however_it_is_cut(
        self, stream: bytes, data: st.DataObject
    ) -> None:
        decoders = [Decoder(MarkKind.ANSWER) for _ in range(2)]
        whole = decoders[0].receive_data(stream)
        cut = [event for piece in pieces(stream, data) for event in decoders[1].receive_data(piece)]
        assert joined(cut) == joined(whole)

    @given(hostile)
    def test_finds_a_mark_behind_anything(self, garbage: bytes) -> None:
        decoder = Decoder(MarkKind.BOOT)
        decoder.receive_data(garbage)
        events = decoder.receive_data(BOOT + b"x")
        assert events[-2:] == [Mark(MarkKind.BOOT, TWO), b"x"]

    @pytest.mark.parametrize(
        "bad", [b"}x", b"}}", b"}~x", b"~x", b"~A0x", b"~A" + b"0" * 33, b"~A" + b"F" * 32]
    )
    def test_of_what_is_malformed_drops_all_up_to_the_next_mark(self, bad: bytes) -> None:
        decoder = Decoder(MarkKind.ANSWER, MarkKind.BOOT)
        decoder.receive_data(BOOT)
        events = [
            event
            for piece in (b"a", bad, b"bcd", ANSWER, b"e")
            for event in decoder.receive_data(piece)
        ]
        assert events == [b"a", Lost(), Mark(MarkKind.ANSWER, ONE), b"e"]

    def test_takes_no_mark_of_another_kind(self) -> None:
        decoder = Decoder(MarkKind.SYNC)
        assert decoder.receive_data(ANSWER + b"x") == []

    def test_drops_all_before_the_first_mark(self) -> None:
        decoder = Decoder(MarkKind.ANSWER)
        events = decoder.receive_data(b"Debian GNU/Linux 12\r\nlogin: }~\0" + ANSWER + b"x")
        assert events == [Mark(MarkKind.ANSWER, ONE), b"x"]


class TestHostStream:
    def test_begins_with_a_sync_and_asks_again_with_the_same(self) -> None:
        stream = HostStream()
        assert stream.begin(ONE) == stream.sync() == encode_mark(MarkKind.SYNC, ONE)
        assert not stream.synced
        assert stream.ended is None

    def test_drops_all_that_comes_before_the_answer(self) -> None:
        stream = HostStream()
        stream.begin(ONE)
        for old in (b"x", encode_mark(MarkKind.ANSWER, TWO), b"payload of another", BOOT):
            assert stream.receive_data(old) == b""
        assert not stream.synced
        assert stream.receive_data(ANSWER + b"x") == b"x"
        assert stream.synced
        assert stream.ended is None

    @given(st.binary(), st.data())
    def test_gives_the_payload_and_ignores_its_own_answer(
        self, payload: bytes, data: st.DataObject
    ) -> None:
        stream = synced()
        sent = ANSWER + encode_payload(payload) + ANSWER + encode_payload(payload)
        assert b"".join(map(stream.receive_data, pieces(sent, data))) == payload + payload
        assert stream.ended is None

    @pytest.mark.parametrize("mark", [BOOT, encode_mark(MarkKind.ANSWER, TWO)])
    def test_ends_when_the_guest_s_program_is_another(self, mark: bytes) -> None:
        stream = synced()
        assert stream.receive_data(b"last" + mark + b"not of this session") == b"last"
        assert stream.ended is not None
        assert "started anew" in stream.ended
        assert stream.receive_data(b"nor this" + ANSWER + b"nor this") == b""

    @pytest.mark.parametrize("bad", [b"}x", encode_mark(MarkKind.SYNC, ONE)])
    def test_ends_at_bytes_that_make_no_sense(self, bad: bytes) -> None:
        stream = synced()
        assert stream.receive_data(b"x" + bad + ANSWER + b"y") == b"x"
        assert stream.ended is not None
        assert "no sense" in stream.ended

    @given(hostile)
    def test_begins_anew_at_any_time(self, before: bytes) -> None:
        stream = synced()
        stream.receive_data(before)
        stream.begin(TWO)
        assert not stream.synced
        assert stream.ended is None
        rest = b"the rest" + encode_mark(MarkKind.ANSWER, ONE) + b"of what was before"
        assert stream.receive_data(rest) == b""
        answer = encode_mark(MarkKind.ANSWER, TWO)
        assert stream.receive_data(answer + encode_payload(ALL_BYTES)) == ALL_BYTES
