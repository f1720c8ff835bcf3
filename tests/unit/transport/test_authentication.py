"""The handshake's messages: only who knows the secret makes them, and none serves twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.transport.authentication import (
    ANSWER_BYTES,
    CHALLENGE_BYTES,
    HELLO_BYTES,
    answer_challenge,
    check_answer,
    make_challenge,
    make_hello,
    parse_hello,
)
from model_parallel.transport.frames import LinkError

MAGIC = b"packtest"
SECRET = bytes(range(32))


def test_both_ends_accept_each_other() -> None:
    hello = make_hello(MAGIC, epoch=2**63, number=7)
    assert parse_hello(hello, MAGIC)[1:] == (2**63, 7)
    challenge = make_challenge(SECRET, hello)
    answer = answer_challenge(SECRET, hello, challenge)
    check_answer(SECRET, hello, challenge, answer)
    assert (len(hello), len(challenge), len(answer)) == (HELLO_BYTES, CHALLENGE_BYTES, ANSWER_BYTES)


@given(st.data())
def test_a_flipped_bit_anywhere_is_refused(data: st.DataObject) -> None:
    hello = make_hello(MAGIC)
    challenge = make_challenge(SECRET, hello)
    answer = answer_challenge(SECRET, hello, challenge)
    messages = [bytearray(hello), bytearray(challenge), bytearray(answer)]
    message = messages[data.draw(st.integers(0, 2))]
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(LinkError):
        parse_hello(bytes(messages[0]), MAGIC)
        check_answer(SECRET, bytes(messages[0]), challenge, bytes(messages[2]))
        answer_challenge(SECRET, hello, bytes(messages[1]))


def test_what_one_side_proves_is_no_proof_of_the_other() -> None:
    hello = make_hello(MAGIC)
    challenge = make_challenge(SECRET, hello)
    with pytest.raises(LinkError):
        check_answer(SECRET, hello, challenge, challenge[-ANSWER_BYTES:])


def test_nothing_recorded_serves_again() -> None:
    hello = make_hello(MAGIC)
    challenge = make_challenge(SECRET, hello)
    answer = answer_challenge(SECRET, hello, challenge)
    assert make_hello(MAGIC) != hello
    with pytest.raises(LinkError):
        check_answer(SECRET, hello, make_challenge(SECRET, hello), answer)


def test_another_secret_or_protocol_is_refused() -> None:
    hello = make_hello(MAGIC)
    with pytest.raises(LinkError, match="another protocol"):
        parse_hello(hello, b"packtrn1")
    with pytest.raises(LinkError, match="secret"):
        answer_challenge(SECRET, hello, make_challenge(bytes(32), hello))
