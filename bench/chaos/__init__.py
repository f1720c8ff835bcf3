"""Faults for a running stack, and whether its clients noticed."""
