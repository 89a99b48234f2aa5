"""Every hand-tuned plan is chosen for its model types, and exact there."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from shardwright import ParallelConfig
from shardwright.distributed.models.build import build_on_meta
from shardwright.distributed.planning.decide import decide
from shardwright.distributed.plans import optimized_plans
from shardwright.distributed.replay.reading import ModelReading
from shardwright.verify.tiny import shrunk_config


@pytest.mark.parametrize("model_type", optimized_plans())
def test_it_is_chosen_and_exact(model_type: str) -> None:
    """One that is not exact gives way to another source."""
    reading = ModelReading(build_on_meta(shrunk_config(CONFIG_MAPPING[model_type]())))
    decided = decide(reading, ParallelConfig(), tp=2, fsdp2=False)
    assert decided.plan is not None
    assert decided.plan.source.partition(" + ")[0] == f"optimized: {optimized_plans()[model_type].family}"
