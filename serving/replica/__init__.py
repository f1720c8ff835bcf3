"""The leader process of a replica group."""
