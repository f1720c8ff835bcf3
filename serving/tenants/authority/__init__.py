"""The one process that decides on quotas and writes the usage ledger."""
