"""All live keys in memory: what a gateway authenticates against, without asking anybody.

A Snapshot is plain data that travels between processes; a KeyDirectory is made from one and never changes.
"""

import hmac
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from serving.contracts.accounts import Principal
from serving.contracts.errors import UnauthenticatedError
from serving.tenants.keys import new_key, read_credentials
from serving.tenants.records import Limits

INVALID_KEY_MESSAGE = "no valid key: send one header `authorization: Bearer KEY`"
"""The same for every reason, so that nobody learns whether a key once was good."""


class TenantEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant that is not disabled, with what its plan and its own settings come to."""

    id: str
    limits: Limits
    weight: float
    priority: int
    cache_salt: bytes

    def __repr__(self) -> str:
        return f"TenantEntry({self.id!r})"  # the salt is a secret


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A key of such a tenant that is not revoked, and was not expired long ago when the snapshot was made."""

    id: str
    tenant_id: str
    quota_id: str
    hash: bytes
    models: tuple[str, ...] | None
    is_admin: bool
    limits: Limits
    expires_unix_s: float | None

    def __repr__(self) -> str:
        return f"KeyEntry({self.id!r})"  # logs need not have hashes


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be authenticated, as of one generation of the database."""

    generation: int
    tenants: tuple[TenantEntry, ...]
    keys: tuple[KeyEntry, ...]


class Quota(msgspec.Struct, frozen=True):
    """Limits, and whose use counts against them."""

    subject: str
    """`tenant:ID` or `key:QUOTA_ID`."""
    limits: Limits


class KeyDirectory:
    """Answers who sends a request. Safe to share between threads and tasks, since nothing in it changes."""

    def __init__(self, snapshot: Snapshot, *, wall_clock: Callable[[], float] = time.time) -> None:
        """`wall_clock` gives UNIX seconds; only it can say whether a key has expired."""
        self.generation = snapshot.generation
        self._wall_clock = wall_clock
        self._keys = {key.id: key for key in snapshot.keys}
        tenants = {tenant.id: tenant for tenant in snapshot.tenants}
        self._principals = {key.id: _principal(key, tenants[key.tenant_id]) for key in snapshot.keys}
        self._quotas = {
            key.id: (
                Quota(f"tenant:{key.tenant_id}", tenants[key.tenant_id].limits),
                Quota(f"key:{key.quota_id}", key.limits),
            )
            for key in snapshot.keys
        }
        self.limits = {quota.subject: quota.limits for quotas in self._quotas.values() for quota in quotas}
        """Of all tenants and keys, by subject."""
        # What is compared when there is nothing to compare, so that every refusal does the same work.
        self._decoy_text = new_key()
        self._decoy_hash = secrets.token_bytes(32)

    def authenticate(self, credentials: Sequence[str]) -> Principal:
        """The sender, from the values of all `authorization` headers. Raises UnauthenticatedError."""
        sent = read_credentials(credentials)
        known = self._keys.get(sent.id) if sent else None
        is_right = hmac.compare_digest(
            (sent or self._decoy_text).hash(), known.hash if known is not None else self._decoy_hash
        )
        if known is None or not is_right or self._is_expired(known):
            raise UnauthenticatedError(INVALID_KEY_MESSAGE)
        return self._principals[known.id]

    def quotas(self, key_id: str) -> tuple[Quota, Quota]:
        """The tenant's and the key's own. Raises KeyError for a key that is not live."""
        return self._quotas[key_id]

    def _is_expired(self, key: KeyEntry) -> bool:
        return key.expires_unix_s is not None and key.expires_unix_s <= self._wall_clock()


def _principal(key: KeyEntry, tenant: TenantEntry) -> Principal:
    return Principal(
        tenant_id=tenant.id,
        key_id=key.id,
        models=None if key.models is None else frozenset(key.models),
        is_admin=key.is_admin,
        weight=tenant.weight,
        priority=tenant.priority,
        cache_salt=tenant.cache_salt,
    )
