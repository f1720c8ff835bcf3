import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.contracts.errors import ValidationError
from serving.tenants.records import LIMITS, MAX_UNIX_S, KeyGrant, Limits, Plan, Tenant, UsageFilter

COUNTS = st.none() | st.integers(1, 10**15)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((Plan, name, value) for name in LIMITS for value in (-1, 10**15 + 1)),
        *((Plan, name, 0) for name in LIMITS if name != "token_budget"),
        *((Plan, "name", value) for value in ("", "A", "a b", "-a", "a-", "a" * 65, "é", "a\n", "a_b")),
        *((Plan, "weight", value) for value in (0.0, -1.0, 1001.0, float("nan"), float("inf"))),
        *((Plan, "priority", value) for value in (-11, 11)),
        (Tenant, "id", "../etc"),
        (Tenant, "plan", ""),
        (Tenant, "name", "x" * 201),
        (Tenant, "name", "bell \x07"),
        (Tenant, "weight", 0.0),
        (Tenant, "priority", 99),
        (KeyGrant, "label", "two\nlines"),
        (KeyGrant, "models", ()),
        (KeyGrant, "models", ("",)),
        (KeyGrant, "models", ("a b",)),
        (KeyGrant, "models", ("m" * 129,)),
        (KeyGrant, "models", ("m",) * 65),
    ],
)
def test_a_wrong_field_is_named_with_its_value(kind: Any, field: str, value: Any) -> None:
    rest = {Plan: {"name": "gold"}, Tenant: {"id": "acme", "plan": "gold"}, KeyGrant: {}}[kind]
    with pytest.raises(ValidationError) as caught:
        kind(**{**rest, field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("unix_s", [-1.0, float("nan"), float("inf"), 1e12])
def test_a_key_ends_at_a_time_that_can_be_written(unix_s: float) -> None:
    with pytest.raises(ValidationError, match="1970"):
        KeyGrant(expires_unix_s=unix_s)


def test_a_budget_may_be_empty_and_a_key_may_administer_alone() -> None:
    assert Limits(token_budget=0).token_budget == 0
    assert KeyGrant(models=(), is_admin=True).models == ()


@given(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS), st.tuples(COUNTS, COUNTS, COUNTS, COUNTS))
def test_a_tenants_limits_replace_its_plans(plan: tuple[int | None, ...], own: tuple[int | None, ...]) -> None:
    limits = Tenant(id="acme", plan="gold", **dict(zip(LIMITS, own, strict=True))).limits_under(
        Plan(name="gold", **dict(zip(LIMITS, plan, strict=True)))
    )
    expected = [theirs if mine is None else mine for mine, theirs in zip(own, plan, strict=True)]
    assert [getattr(limits, name) for name in LIMITS] == expected


def test_usage_is_asked_for_in_the_order_of_time() -> None:
    with pytest.raises(
        ValidationError, match=r"until must be after since, which is 1970-01-01T00:00:10\+00:00, not 1970-"
    ):
        UsageFilter(since_unix_s=10, until_unix_s=10)
    for name in ("since_unix_s", "until_unix_s"):
        for moment in (-1.0, MAX_UNIX_S + 1, math.nan):
            with pytest.raises(ValidationError, match="must be from 1970 to 9999"):
                UsageFilter(**{name: moment})


@pytest.mark.parametrize("name", ["tenant_id", "key_id", "model"])
def test_usage_is_asked_for_by_names_that_a_database_takes(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} must have no NUL"):
        UsageFilter(**{name: "a\0"})
