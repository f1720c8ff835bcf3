import hashlib
import hmac
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.contracts.errors import UnauthenticatedError
from serving.tenants import directory as directory_module
from serving.tenants.directory import INVALID_KEY_MESSAGE, KeyDirectory, Snapshot
from serving.tenants.keys import new_key
from serving.tenants.records import KeyGrant, Limits, Plan, Tenant
from serving.tenants.store.store import Store
from tests.unit.tenants.conftest import NOON_UNIX_S, Clock


@pytest.fixture
def gold(store: Store) -> Store:
    """With a plan and a tenant."""
    store.create_plan(Plan(name="gold", tokens_per_minute=1000, token_budget=5000, weight=2.0, priority=-1))
    store.create_tenant(Tenant(id="acme", plan="gold", tokens_per_minute=2000))
    return store


def directory(store: Store, clock: Clock) -> KeyDirectory:
    return KeyDirectory(store.snapshot(), wall_clock=clock)


def accepts(directory: KeyDirectory, text: str) -> bool:
    try:
        directory.authenticate([f"Bearer {text}"])
    except UnauthenticatedError as error:
        assert str(error) == INVALID_KEY_MESSAGE
        return False
    return True


def test_a_key_tells_who_sends_and_what_they_may(gold: Store, clock: Clock) -> None:
    issued = gold.create_key("acme", KeyGrant(models=("a", "b"), requests_per_minute=7))
    known = directory(gold, clock)
    principal = known.authenticate([f"Bearer {issued.text}"])
    assert (principal.tenant_id, principal.key_id) == ("acme", issued.key.id)
    assert principal.models == {"a", "b"}
    assert not principal.is_admin
    assert (principal.weight, principal.priority) == (2.0, -1)
    assert [(quota.subject, quota.limits) for quota in known.quotas(issued.key.id)] == [
        ("tenant:acme", Limits(tokens_per_minute=2000, token_budget=5000)),
        (f"key:{issued.key.id}", Limits(requests_per_minute=7)),
    ]


def test_tenants_have_salts_of_their_own_that_last(gold: Store, clock: Clock) -> None:
    gold.create_tenant(Tenant(id="other", plan="gold"))
    keys = [gold.create_key(tenant_id, KeyGrant()).text for tenant_id in ("acme", "acme", "other")]
    for _ in range(2):
        salts = [directory(gold, clock).authenticate([f"Bearer {key}"]).cache_salt for key in keys]
        assert salts[0] == salts[1] != salts[2]
        assert all(len(salt) == 32 for salt in salts)


def test_every_refusal_says_the_same(gold: Store, clock: Clock) -> None:
    good = gold.create_key("acme", KeyGrant()).text
    known = directory(gold, clock)
    assert accepts(known, good)
    for wrong in (new_key().text, good[:-1] + ("B" if good[-1] == "A" else "A"), "x", "", "0" * 5000):
        assert not accepts(known, wrong)
    for credentials in ([], [f"Bearer {good}"] * 2, [good]):
        with pytest.raises(UnauthenticatedError, match=INVALID_KEY_MESSAGE):
            known.authenticate(credentials)


@given(st.data())
def test_no_other_text_passes_for_a_key(data: st.DataObject) -> None:
    key = new_key()
    entry = directory_module.KeyEntry(
        id=key.id, tenant_id="acme", quota_id=key.id, hash=key.hash(), models=None, is_admin=False, limits=Limits(),
        expires_unix_s=None,
    )  # fmt: skip
    tenant = directory_module.TenantEntry(id="acme", limits=Limits(), weight=1.0, priority=0, cache_salt=b"")
    known = KeyDirectory(Snapshot(generation=1, tenants=(tenant,), keys=(entry,)))
    position = data.draw(st.integers(0, len(key.text) - 1))
    character = data.draw(st.characters(codec="ascii"))
    text = key.text[:position] + character + key.text[position + 1 :]
    assert accepts(known, text) == (text == key.text)


def test_every_answer_compares_two_hashes_in_constant_time(
    gold: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is sent, one SHA-256 of a key's length is made and compare_digest sees two values of 32 bytes."""
    good = gold.create_key("acme", KeyGrant()).text
    expired = gold.create_key("acme", KeyGrant(expires_unix_s=NOON_UNIX_S + 1)).text
    known = directory(gold, clock)
    clock.unix_s += 10
    hashed: list[int] = []
    compared: list[tuple[int, int]] = []
    sha256, compare = hashlib.sha256, hmac.compare_digest
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    sent = [[f"Bearer {text}"] for text in (good, expired, new_key().text, good[:-2] + "xy", "junk", "j" * 1000)]
    for credentials in [*sent, [], [good] * 2]:
        with suppress(UnauthenticatedError):
            known.authenticate(credentials)
        assert (hashed.pop(), hashed) == (len(good), [])
        assert (compared.pop(), compared) == ((32, 32), [])


def test_a_key_ends_when_it_expires(gold: Store, clock: Clock) -> None:
    key = gold.create_key("acme", KeyGrant(expires_unix_s=NOON_UNIX_S + 60)).text
    known = directory(gold, clock)
    clock.unix_s += 59.9
    assert accepts(known, key)
    clock.unix_s += 0.1
    assert not accepts(known, key)
    assert directory(gold, clock).generation == known.generation
    assert not accepts(directory(gold, clock), key)
    clock.unix_s += 86_400
    assert gold.snapshot().keys == ()


def test_a_key_is_good_by_the_gateways_clock_whatever_the_authoritys_says(gold: Store, clock: Clock) -> None:
    key = gold.create_key("acme", KeyGrant(expires_unix_s=NOON_UNIX_S + 60)).text
    clock.unix_s += 3600
    snapshot = gold.snapshot()
    clock.unix_s -= 3600
    known = KeyDirectory(snapshot, wall_clock=clock)
    assert accepts(known, key)
    clock.unix_s += 60
    assert not accepts(known, key)


def test_a_revoked_key_and_a_disabled_tenant_are_in_no_later_directory(gold: Store, clock: Clock) -> None:
    first, second = (gold.create_key("acme", KeyGrant()) for _ in range(2))
    gold.revoke_key(first.key.id)
    assert not accepts(directory(gold, clock), first.text)
    assert accepts(directory(gold, clock), second.text)
    gold.set_tenant_disabled("acme", True)
    assert not accepts(directory(gold, clock), second.text)
    gold.set_tenant_disabled("acme", False)
    assert accepts(directory(gold, clock), second.text)
    assert not accepts(directory(gold, clock), first.text)


def test_both_keys_are_good_while_a_rotation_overlaps(gold: Store, clock: Clock) -> None:
    old = gold.create_key("acme", KeyGrant(label="web", models=("a",), token_budget=10))
    new = gold.rotate_key(old.key.id, overlap_s=3600)
    known = directory(gold, clock)
    assert accepts(known, old.text) and accepts(known, new.text)
    assert known.quotas(new.key.id) == known.quotas(old.key.id)  # one budget, however often it is rotated
    clock.unix_s += 3600
    assert not accepts(known, old.text)
    assert accepts(known, new.text)
    newest = gold.rotate_key(new.key.id, overlap_s=0)
    known = directory(gold, clock)
    assert not accepts(known, new.text)
    assert accepts(known, newest.text)
    assert newest.key.quota_id == old.key.id


def test_no_secret_is_in_a_repr(gold: Store, clock: Clock) -> None:
    issued = gold.create_key("acme", KeyGrant())
    snapshot = gold.snapshot()
    principal = KeyDirectory(snapshot, wall_clock=clock).authenticate([f"Bearer {issued.text}"])
    shown = repr((issued, snapshot, principal, KeyDirectory(snapshot)))
    assert "acme" in shown and issued.key.id in shown
    for secret in (issued.text[20:], repr(principal.cache_salt), repr(snapshot.keys[0].hash)):
        assert secret not in shown


def test_a_snapshot_travels_as_bytes(gold: Store) -> None:
    gold.create_key("acme", KeyGrant(models=("a",)))
    gold.create_key("acme", KeyGrant(is_admin=True, models=()))
    snapshot = gold.snapshot()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=Snapshot) == snapshot
