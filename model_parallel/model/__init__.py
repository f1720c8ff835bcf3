"""The architecture: Llama cut over ranks by a partition table."""
