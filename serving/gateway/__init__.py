"""The front end: validate, tokenize, route, detokenize. Imports neither ray nor torch nor cluster."""
