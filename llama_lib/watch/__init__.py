"""Who takes part in a run, whether it gets on, and how it ends when it does not."""
