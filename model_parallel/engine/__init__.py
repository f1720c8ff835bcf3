"""Scheduling and bookkeeping of one replica group, in plain Python: no torch, no I/O, clock injected."""
