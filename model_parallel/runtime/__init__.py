"""Running ranks: batches, collectives, processes."""
