"""Many hosts as one: host files, checking hosts, starting a job on them and keeping it alive.

Invariant: nothing in this package imports torch, transformers or ColossalAI unless its own
docstring says so, so that a host can be judged before any of them is known to work there.
"""
