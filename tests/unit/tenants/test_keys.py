import base64
import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.contracts.errors import ValidationError
from serving.tenants.keys import MAX_HEADER_LENGTH, check_key_id, new_key, read_credentials, without_secrets
from serving.tenants.records import KeyGrant, Plan, Tenant, UsageFilter

KEY = "pt_0123456789abcdef_" + "A" * 43


def test_a_key_is_a_mark_an_id_and_256_random_bits() -> None:
    keys = [new_key() for _ in range(50)]
    assert len({key.text for key in keys}) == len({key.id for key in keys}) == 50
    for key in keys:
        mark, key_id, secret = key.text.split("_", 2)
        assert (mark, key_id) == ("pt", key.id)
        assert len(base64.urlsafe_b64decode(secret + "=")) == 32
        assert key.hash() == hashlib.sha256(key.text.encode()).digest()
        assert read_credentials([f"Bearer {key.text}"]) == key


def test_the_text_of_a_key_is_not_in_its_repr() -> None:
    key = new_key()
    assert key.text[20:] not in repr(key)
    assert key.id in repr(key)


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY}", f"Bearer {KEY} "])
def test_the_scheme_is_written_in_any_case(header: str) -> None:
    key = read_credentials([header])
    assert key is not None and key.text == KEY


@pytest.mark.parametrize(
    "credentials",
    [
        [],
        [f"Bearer {KEY}", f"Bearer {KEY}"],
        [""],
        ["Bearer"],
        ["Bearer "],
        [KEY],
        [f"Basic {KEY}"],
        [f"Bearer{KEY}"],
        [f"Bearer {KEY}, Bearer {KEY}"],
        [f"Bearer {KEY}\n"],
        [f" Bearer {KEY}"],
        [f"Bearer\t{KEY}"],
        [f"Bearer {KEY[:-1]}"],
        [f"Bearer {KEY}A"],
        [f"Bearer {KEY[:-1]}="],
        [f"Bearer {KEY.upper()}"],
        [f"Bearer {KEY[:-1]}\x00"],
        [f"Bearer {KEY[:-1]}%00"],
        [f"Bearer {KEY[:-1]}\u0430"],  # a Cyrillic letter
        ["Bearer ' OR 1=1 --"],
        ["Bearer " + "A" * (1 << 20)],
        [f"Bearer {KEY}" + " " * MAX_HEADER_LENGTH],
    ],
)
def test_what_is_not_one_key_is_none(credentials: list[str]) -> None:
    assert read_credentials(credentials) is None


@given(st.lists(st.text(max_size=100), max_size=3))
def test_any_text_is_read_without_error(credentials: list[str]) -> None:
    assert read_credentials(credentials) is None


SECRET = KEY[20:]
TYPED = [KEY, f"Bearer {KEY}", KEY.upper(), KEY[3:], KEY[:40], f"{KEY}\n", f"{KEY} {KEY}"]
"""Whole keys, and what of them people copy."""


@pytest.mark.parametrize("text", TYPED)
def test_what_was_typed_is_shown_without_its_secret(text: str) -> None:
    shown = without_secrets(text)
    assert "0123456789abcdef_…" in shown.lower()
    assert "AAAA" not in shown


@pytest.mark.parametrize("text", ["", "acme", "llama-2-7b", "0123456789abcdef", "tenant_0123_x", "a" * 200])
def test_what_is_no_key_is_shown_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("text", [*TYPED, SECRET])
def test_a_whole_key_in_place_of_its_id_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValidationError, match="between the underscores") as caught:
        check_key_id("id", text)
    assert caught.value.field == "id" and "AAAA" not in str(caught.value)
    assert ("'0123456789abcdef'" in str(caught.value).lower()) is (text != SECRET)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Plan(name=text),
        lambda text: Tenant(id=text, plan="gold"),
        lambda text: Tenant(id="acme", plan=text),
        lambda text: Tenant(id="acme", plan="gold", name=f"{text}\n"),
        lambda text: KeyGrant(models=(f"{text} ",)),
        lambda text: KeyGrant(label=f"{text}\n"),
        lambda text: UsageFilter(key_id=text),
    ],
)
def test_a_whole_key_in_any_field_is_not_repeated(make: Callable[[str], object]) -> None:
    for text in TYPED:
        with pytest.raises(ValidationError) as caught:
            make(text)
        assert "AAAA" not in str(caught.value)
