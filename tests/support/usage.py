"""Usage records for tests."""

from typing import Any

from serving.contracts.accounts import UsageRecord


def usage_record(request_id: str, **changes: Any) -> UsageRecord:
    """Of tenant "t" and key "k", of nothing used, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "tenant_id": "t",
        "key_id": "k",
        "model": "m",
        "num_prompt_tokens": 0,
        "num_cached_tokens": 0,
        "num_completion_tokens": 0,
        "outcome": "stop",
        "started_unix_s": 0.0,
        "gateway_s": 0.0,
        "queue_s": 0.0,
        "prefill_s": 0.0,
        "decode_s": 0.0,
        "total_s": 0.0,
    }
    return UsageRecord(request_id=request_id, **(values | changes))
