"""Measurements of this checkout, for developers; `packtrain bench` is what is installed. Not part of the wheel."""
