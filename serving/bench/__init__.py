"""`packtrain bench`: how fast an engine, and a gateway under load, are on this machine."""
