"""Proof that a sharded model is the same function as the model in one process."""
