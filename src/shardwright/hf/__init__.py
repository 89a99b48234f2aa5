"""Hugging Face's training loops on sharded models: accelerate, transformers' Trainer, TRL.

``shardwright.parallelize`` calls :func:`connect`; a script needs nothing of this package. See ``docs/trainers.md``.
"""

from shardwright.hf.accelerator import ShardedAccelerator
from shardwright.hf.connect import connect

__all__ = ["ShardedAccelerator", "connect"]
