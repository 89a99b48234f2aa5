"""One file per contender: how each library loads a checkpoint folder and spreads the model over the ranks.

These files run in the contender's own interpreter and import nothing of Shardwright, but for ``ours.py``.
"""
