"""The `packtrain` command: one module for each group of commands."""
