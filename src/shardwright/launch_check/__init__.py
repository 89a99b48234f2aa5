"""``shardwright launch-check``: what the ranks of a launcher are, how fast their links are, and what looks wrong."""
