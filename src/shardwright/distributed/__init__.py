"""Planning and applying parallelism. ``parallelizer`` is the public page; ``docs/design.md`` has the map."""
