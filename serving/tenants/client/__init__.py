"""A gateway's half of tenancy: keys in memory, leases of quotas, balances."""
