"""packtrain.v1.Admin: the operators' service, which runs in the process of `packtrain serve`."""
