"""How long a refusal takes tells nothing of how right the key was (Welch's t-test, as dudect does it)."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from itertools import combinations

import numpy as np
import pytest
import scipy

from serving.contracts.errors import UnauthenticatedError
from serving.tenants.directory import KeyDirectory
from serving.tenants.records import KeyGrant, Plan, Tenant
from serving.tenants.store.store import Store

NUM_SAMPLES = 1_000_000
"""Of each kind."""
NUM_KEYS = 1000
MAX_T = 4.5
"""As in dudect and TVLA: below it there is no evidence of a difference."""


def times_ns(kinds: Mapping[str, Callable[[], list[str]]], known: KeyDirectory) -> dict[str, np.ndarray]:
    """Of one refusal each. Keys are made by the thousand beforehand and come in random order, so that whatever else the machine
    does, and what lies in its caches, meets all kinds alike."""
    names = list(kinds)
    rng = random.Random(1)
    taken: list[list[int]] = [[] for _ in names]
    gc.disable()
    try:
        for _ in range(NUM_SAMPLES // NUM_KEYS):
            order = [kind for kind in range(len(names)) for _ in range(NUM_KEYS)]
            rng.shuffle(order)
            made = [(kind, kinds[names[kind]]()) for kind in order]
            rng.shuffle(made)
            for kind, credentials in made:
                start = time.perf_counter_ns()
                try:
                    known.authenticate(credentials)
                except UnauthenticatedError:
                    end = time.perf_counter_ns()
                else:
                    raise AssertionError("a wrong key was taken")
                taken[kind].append(end - start)
    finally:
        gc.enable()
    return {name: np.array(values, dtype=float) for name, values in zip(names, taken, strict=True)}


def welch_t(one: np.ndarray, other: np.ndarray) -> float:
    """Without the slowest hundredth of both together, which interruptions make."""
    limit = np.quantile(np.concatenate([one, other]), 0.99)
    return abs(float(scipy.stats.ttest_ind(one[one < limit], other[other < limit], equal_var=False).statistic))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_wrong_keys_take_equally_long(store: Store) -> None:
    """However much of the secret is right. All have the characters of the right one, since reading a key takes as long as its
    characters make it; its id is no secret."""
    store.create_plan(Plan(name="gold"))
    store.create_tenant(Tenant(id="acme", plan="gold"))
    good = store.create_key("acme", KeyGrant()).text
    known = KeyDirectory(store.snapshot())
    head, secret = good[: -len(good.split("_", 2)[2])], good.split("_", 2)[2]
    rng = random.Random(2)

    def swapped(position: int) -> str:
        """Two neighbours that differ have changed places, from `position` on."""
        while secret[position] == secret[position + 1]:
            position += 1
        return secret[:position] + secret[position + 1] + secret[position] + secret[position + 2 :]

    def sent(make: Callable[[], str]) -> Callable[[], list[str]]:
        return lambda: [f"Bearer {head}{make()}"]

    kinds = {
        "wrong at the start": sent(lambda: swapped(rng.randrange(8))),
        "wrong at the end": sent(lambda: swapped(len(secret) - 12 + rng.randrange(8))),
        "wrong everywhere": sent(lambda: "".join(rng.sample(secret, len(secret)))),
    }
    taken = times_ns(kinds, known)
    found = {pair: welch_t(taken[pair[0]], taken[pair[1]]) for pair in combinations(kinds, 2)}
    assert all(t < MAX_T for t in found.values()), found


def test_the_comparison_would_find_a_difference() -> None:
    """Of a nanosecond in a thousand."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(2000, 100, NUM_SAMPLES // 10), rng.normal(2002, 100, NUM_SAMPLES // 10)
    assert welch_t(one, other + 3) > MAX_T
    assert welch_t(one, rng.normal(2000, 100, NUM_SAMPLES // 10)) < MAX_T
