"""``shardwright demo``: a small Llama on four ranks of this machine, from a text that every machine has."""
