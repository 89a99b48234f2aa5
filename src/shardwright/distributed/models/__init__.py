"""What a model is: its blocks, ties, heads, embedding and head, its Hugging Face plan, building it on meta.

With :mod:`shardwright.distributed.planning` the only layer that knows transformers.
"""
