"""Times on the wire, which count microseconds, and those that are kept, which are finer: what goes out can be asked for."""

import math
from fractions import Fraction

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import example, given
from hypothesis import strategies as st

from protos import admin_pb2 as pb
from serving.admin import convert
from serving.contracts.accounts import UsageRecord
from serving.tenants.records import MAX_UNIX_S, KeyGrant, iso_time


def started(unix_s: float) -> Timestamp:
    """Of a record, as it goes out."""
    names = UsageRecord.__struct_fields__
    values = {name: "" for name in names if name in ("request_id", "tenant_id", "key_id", "model", "outcome")}
    record = UsageRecord(**{**dict.fromkeys(names, 0), **values, "started_unix_s": unix_s})  # type: ignore[arg-type]
    return convert.usage_message(record).started


@given(unix_s=st.floats(0, 1e10))
@example(unix_s=1_700_000_000.1234567)
@example(unix_s=math.nextafter(1_700_000_001.0, 0))
@example(unix_s=0.9999999)
@example(unix_s=MAX_UNIX_S)
def test_a_record_is_listed_from_its_own_time_on(unix_s: float) -> None:
    since = convert.usage_filter(pb.ListUsageRequest(since=started(unix_s))).since_unix_s
    assert since is not None and since <= unix_s
    assert Fraction(unix_s) - Fraction(since) < Fraction(11, 10**7), "nor from much earlier on"


@given(microseconds=st.integers(0, int(MAX_UNIX_S) * 10**6))
def test_whole_microseconds_come_back_as_they_were_given(microseconds: int) -> None:
    given_ = Timestamp()
    given_.FromMicroseconds(microseconds)
    grant = convert.key_grant(pb.KeyGrant(all_models=True, expires=given_))
    assert isinstance(grant, KeyGrant) and grant.expires_unix_s is not None
    if microseconds < 2**33 * 10**6:  # after the year 2242 such numbers are coarser than that
        assert started(grant.expires_unix_s) == given_


def test_a_time_for_people_is_the_second_in_which_it_lies() -> None:
    assert iso_time(1_800_000_000 - 1e-6) == "2027-01-15T07:59:59+00:00"
    assert iso_time(math.nextafter(1_800_000_000.0, 0)) == "2027-01-15T07:59:59+00:00"
    assert iso_time(1_800_000_000.0) == "2027-01-15T08:00:00+00:00"
