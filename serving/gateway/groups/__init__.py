"""The gateway's side of the replica groups: which group takes a request, and how its outputs come back."""
