"""The simulation beside the real stack: what is measured, what is made of it, and the table."""
