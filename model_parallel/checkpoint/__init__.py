"""Reading checkpoints: only the slices that a rank holds."""
