"""Prediction: what a plan does to a model, before anything runs.

Built on the resolved plan alone: no process group, no GPU, no weights.

>>> from shardwright import ParallelConfig
>>> from shardwright.estimate import predict
>>> predict("qwen3", ParallelConfig(tp=8, dp_shard=4, precision="bf16")).memory.total  # doctest: +SKIP
6025691136
"""

from shardwright.estimate.predict import Prediction, predict

__all__ = ["Prediction", "predict"]
