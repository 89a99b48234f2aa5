"""A copy of a model without its weights, one recorded run of it, and ranks that are replayed against the record."""
