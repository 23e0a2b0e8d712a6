"""Memory and time of a run before it starts.

Invariant: nothing in this package imports torch or transformers.
"""
