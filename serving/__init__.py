"""What clients meet: gateway, replica groups as Ray Serve deployments, configuration and command line."""

__version__ = "0.2.0"
"""The one place: the package's metadata, /metrics and `packtrain --version` take it from here."""
