"""Delivery: from what the registry asks for to what serves."""
