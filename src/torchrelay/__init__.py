"""Torchrelay carries a PyTorch model from a dataset change to production and back."""

__version__ = "0.1.0"
