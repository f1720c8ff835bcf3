"""Connections between processes: frames, mutual authentication, socket options. Both socket protocols are built on it."""
