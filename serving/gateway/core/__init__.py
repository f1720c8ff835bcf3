"""What a gateway does with a request, whatever protocol brought it. Knows no transport, no Ray, no torch."""
