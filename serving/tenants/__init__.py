"""Tenants, their keys and plans, quotas and the record of what was used. No module but these imports sqlalchemy."""
