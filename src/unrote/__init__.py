"""Train diffusion models that do not learn their data by rote, and prove it."""

__version__ = "0.1.0"
