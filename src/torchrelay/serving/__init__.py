"""What a serving node does: engines behind adapters, the gateway before them, and `apply`, which steers both."""
