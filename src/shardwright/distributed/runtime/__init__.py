"""What runs inside a forward: collectives, regions, sharded tensors, local sizes, sums of gradients."""
