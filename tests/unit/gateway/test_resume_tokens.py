"""A resume token is good for its own tenant, request, model and time alone, and says so field by field."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.support.fake_backend import card
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import ConfigError
from serving.contracts.errors import (
    CannotResumeError,
    GroupUnavailableError,
    PermissionDeniedError,
    ServingError,
    ValidationError,
)
from serving.gateway.core.resume_tokens import LIFETIME_S, AskedStream, ResumeTokens, as_text, from_text, load_key

KEY = b"k" * 32
REQUEST_ID = "0123456789abcdef" * 2
ASKED = AskedStream(request=b"what", tenant_id="acme", card=card())


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def tokens(clock: Clock | None = None, key: bytes = KEY) -> ResumeTokens:
    return ResumeTokens(key, clock or Clock())


def made(seed: int = 2**64 - 1) -> bytes:
    return tokens().begin(ASKED, request_id=REQUEST_ID, seed=seed).token()


def test_any_gateway_with_the_key_reads_what_another_has_made() -> None:
    stream = tokens().resume(made(), ASKED, (3, 4))
    assert (stream.billed_id, stream.seed, stream.created_unix_s) == (REQUEST_ID, 2**64 - 1, 1_800_000_000)
    assert [stream.num_delivered(choice) for choice in range(3)] == [3, 4, 0]
    assert tokens().resume(stream.token(), ASKED, (5,)).billed_id == REQUEST_ID, "and it can be resumed again"


WRONG: list[tuple[AskedStream, type[ServingError], str]] = [
    (replace(ASKED, tenant_id="other"), PermissionDeniedError, "another tenant"),
    (replace(ASKED, request=b"else"), ValidationError, "another request"),
    (replace(ASKED, card=card("plain")), CannotResumeError, "another state of model 'plain'"),
    (replace(ASKED, card=card(checkpoint="other")), CannotResumeError, "another state"),
    (replace(ASKED, card=card(dtype="bfloat16")), CannotResumeError, "another state"),
    (replace(ASKED, card=card(adapter=AdapterRef("ab" * 32, "/a"))), CannotResumeError, "another state"),
    (replace(ASKED, card=card(deterministic=False)), CannotResumeError, "another state"),
    (replace(ASKED, card=card(kernels="")), GroupUnavailableError, "no replica group"),
]


@pytest.mark.parametrize(("asked", "error", "words"), WRONG)
def test_it_is_refused_elsewhere(asked: AskedStream, error: type[ServingError], words: str) -> None:
    with pytest.raises(error, match=words) as refused:
        tokens().resume(made(), asked, ())
    if error is not GroupUnavailableError:
        assert refused.value.field == "resume_token"
        assert as_text(made())[:24] in str(refused.value), "the value is shown"


def test_the_number_of_groups_does_not_matter() -> None:
    tokens().resume(made(), replace(ASKED, card=card(num_groups=7)), ())


def test_it_expires() -> None:
    clock = Clock()
    clock.now_s += LIFETIME_S
    tokens(clock).resume(made(), ASKED, ())
    clock.now_s += 2
    with pytest.raises(CannotResumeError, match="expired 2 s ago; a token is good for 600 s") as refused:
        tokens(clock).resume(made(), ASKED, ())
    assert refused.value.status.code == "FAILED_PRECONDITION"


def test_a_long_stream_gets_another_one_before_it_expires() -> None:
    clock = Clock()
    stream = tokens(clock).begin(ASKED, request_id=REQUEST_ID, seed=1)
    first = stream.token()
    clock.now_s += LIFETIME_S / 2 - 1
    assert stream.token() is first
    clock.now_s += 1
    second = stream.token()
    assert second != first
    clock.now_s += LIFETIME_S - 1
    assert tokens(clock).resume(second, ASKED, ()).created_unix_s == 1_800_000_000


@given(data=st.data())
def test_no_other_bytes_are_taken(data: st.DataObject) -> None:
    token = bytearray(made())
    place = data.draw(st.integers(0, 8 * len(token) - 1))
    token[place // 8] ^= 1 << place % 8
    cut = token[: data.draw(st.integers(0, len(token) - 1))]
    for wrong in (bytes(token), bytes(cut), bytes(token) + b"x", data.draw(st.binary(max_size=200))):
        with pytest.raises(ValidationError, match=r"allowed: the last one that the stream has told, 81 bytes"):
            tokens().resume(wrong, ASKED, ())


def test_another_deployments_is_none_of_ours() -> None:
    with pytest.raises(ValidationError, match="not one that this deployment has made"):
        tokens(key=b"x" * 32).resume(made(), ASKED, ())


def test_its_digests_are_the_deployments_own() -> None:
    """Whoever finds a token cannot try out requests and tenants: only times, id and seed are the same under another key."""
    other = tokens(key=b"x" * 32).begin(ASKED, request_id=REQUEST_ID, seed=2**64 - 1).token()
    known = 1 + 16 + 4 + 4 + 8
    assert made()[:known] == other[:known]
    for first, last in ((known, known + 8), (known + 8, known + 16), (known + 16, known + 32)):
        assert made()[first:last] != other[first:last]


def test_a_model_that_is_not_deterministic_has_none() -> None:
    asked = replace(ASKED, card=card(deterministic=False))
    assert tokens().begin(asked, request_id=REQUEST_ID, seed=1).token() == b""


@given(data=st.binary(max_size=100))
def test_text_and_back(data: bytes) -> None:
    assert from_text(as_text(data)) == data


@given(text=st.text(max_size=50))
def test_any_text_is_read(text: str) -> None:
    from_text(text)


def test_a_key_of_an_operators(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match=r"gateway.resume_key_file: .*key: No such file"):
        load_key(path)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 bytes; at least 32"):
        load_key(path)
    path.write_text("ab" * 32 + "\n")
    assert load_key(path) == b"ab" * 32


def test_every_field_of_the_model_counts() -> None:
    """Two cards that differ in anything but the number of groups have different digests."""
    before: Any = card()
    for name in before.__struct_fields__:
        if name in ("num_groups", "deterministic", "kernels"):
            continue
        value = getattr(before, name)
        match value:
            case bool():
                other: Any = not value
            case int():
                other = value + 1
            case str():
                other = value + "x"
            case tuple():
                other = (*value, 7)
            case dict():
                other = {"top_k": 1.0}
            case None:
                continue
            case _:
                other = msgspec.structs.replace(value, name="x")
        with pytest.raises(CannotResumeError):
            tokens().resume(made(), replace(ASKED, card=msgspec.structs.replace(before, **{name: other})), ())
