import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.tenants.keys import MAX_HEADER_LENGTH, new_key, read_credentials

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
