"""The wire format. inference.proto is the source; the stubs beside it are made by `python -m protos.generate`."""
