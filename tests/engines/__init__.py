"""Helpers of the engine tests: a second, minimal engine, and archives to load into either."""
