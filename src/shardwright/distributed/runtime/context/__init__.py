"""Context parallelism inside a forward: sequences that are split over the ``cp`` ranks."""
