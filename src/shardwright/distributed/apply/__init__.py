"""The steps. Each changes a model in place and imports no other; ``parallelizer`` puts them in order."""
