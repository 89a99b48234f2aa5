"""The main job: next-token training of a sharded Hugging Face model, behind ``shardwright train``.

Read in this order: ``config`` (what can be set), ``launch`` (one process becomes many ranks), ``prepare`` (text becomes
packed tokens, once per machine), ``rank`` (what one rank does from start to end), ``loop`` (the training step).
"""
