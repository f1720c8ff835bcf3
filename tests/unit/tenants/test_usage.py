from itertools import pairwise

import pytest

from serving.contracts.accounts import UsageRecord
from serving.tenants.records import UsageFilter
from serving.tenants.store.schema import UsageRow
from serving.tenants.store.store import Store
from serving.tenants.store.usage import UsageSum, all_usage, list_usage, sum_usage


def record(index: int, **changes: object) -> UsageRecord:
    """Records of even and odd numbers differ in tenant, key and model; every two start at the same time."""
    values = {
        "request_id": f"r{index:03}",
        "tenant_id": ("acme", "other")[index % 2],
        "key_id": ("k1", "k2")[index % 2],
        "model": ("tiny", "plain")[index % 2],
        "num_prompt_tokens": 10,
        "num_cached_tokens": 4,
        "num_completion_tokens": index,
        "outcome": "stop",
        "started_unix_s": 1000.1 + index // 2,
        "gateway_s": 0.1,
        "queue_s": 0.2,
        "prefill_s": 0.3,
        "decode_s": 0.4,
        "total_s": 1.0,
    }
    return UsageRecord(**(values | changes))  # type: ignore[arg-type]


def keep(store: Store, records: list[UsageRecord]) -> None:
    with store.database.write() as session:
        session.add_all(
            UsageRow(**{name: getattr(record, name) for name in UsageRecord.__struct_fields__}) for record in records
        )


@pytest.fixture
def used(store: Store) -> Store:
    """With twenty records, kept in another order than they started."""
    keep(store, [record(index) for index in reversed(range(20))])
    return store


def test_records_come_back_as_they_were_in_the_order_of_their_start(used: Store) -> None:
    assert list_usage(used.database, UsageFilter(), limit=100) == [record(index) for index in range(20)]


def test_pages_join_without_gap_or_repeat(used: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenants.store.usage.PAGE_SIZE", 3)
    ids = [record.request_id for record in all_usage(used.database, UsageFilter())]
    assert len(ids) == 20 and all(first < second for first, second in pairwise(ids))


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (UsageFilter(tenant_id="acme"), range(0, 20, 2)),
        (UsageFilter(key_id="k2"), range(1, 20, 2)),
        (UsageFilter(model="plain"), range(1, 20, 2)),
        (UsageFilter(tenant_id="acme", model="plain"), ()),
        (UsageFilter(since_unix_s=1008.1), range(16, 20)),
        (UsageFilter(until_unix_s=1001.1), range(2)),
        (UsageFilter(tenant_id="other", since_unix_s=1001, until_unix_s=1003.1), (3, 5)),
    ],
)
def test_filters_narrow(used: Store, wanted: UsageFilter, indices: range) -> None:
    assert list_usage(used.database, wanted, limit=100) == [record(index) for index in indices]


def test_sums_are_by_tenant_key_and_model(used: Store) -> None:
    keep(used, [record(20, model="plain", num_completion_tokens=7)])
    assert sum_usage(used.database, UsageFilter()) == [
        UsageSum("acme", "k1", "plain", 1, 10, 4, 7),
        UsageSum("acme", "k1", "tiny", 10, 100, 40, 90),
        UsageSum("other", "k2", "plain", 10, 100, 40, 100),
    ]
    assert sum_usage(used.database, UsageFilter(tenant_id="nobody")) == []
