"""Collectives of ranks that share a host's memory."""
