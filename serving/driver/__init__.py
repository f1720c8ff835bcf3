"""The process of `packtrain serve`: it starts Ray, the groups and the gateways, and stops them."""
