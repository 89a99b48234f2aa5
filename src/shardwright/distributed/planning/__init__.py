"""Every decision about how a model is sharded: which plan, what it means for the model, whether it is exact.

Needs no process group, no GPU and no weights.
"""
