"""The schema's history: each file in versions is one step, run in order when a database is opened.

A step is written by hand, and never changed once released. A test checks that all of them make what `schema` says.
"""
