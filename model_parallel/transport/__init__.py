"""Frames and authentication of the connections between processes."""
