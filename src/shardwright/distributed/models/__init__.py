"""Reading a model: its blocks, heads, ties and embeddings, the plans it brings along, and which plan fits it.

The only layer that knows transformers.
"""
