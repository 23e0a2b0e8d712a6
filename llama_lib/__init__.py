"""A Llama training application on ColossalAI's Booster plugins."""

__version__ = "0.1.0"
