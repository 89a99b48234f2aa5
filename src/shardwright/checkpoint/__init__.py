"""Weights straight into the shards, and out again. ``docs/checkpoints.md`` says what is promised."""
