"""``Workload``: what a training step works on, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shardwright.distributed.precision import DTYPES
from shardwright.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """What every step works on.

    Attributes:
        seq_len: tokens of a sequence.
        batch_size: sequences of a micro-batch, on each data-parallel rank.
        accumulation: micro-batches of a step.
        optimizer: a name in :data:`shardwright.estimate.optimizers.OPTIMIZERS`.
        optimizer_dtype: of its state; None: that of the parameters.
        reduce_last_only: gradients are summed over the data-parallel ranks with the last micro-batch alone
            (``set_requires_gradient_sync(False)`` before), so that every rank holds whole ones until then.
        loss: ``"model"``: the model's own, from labels; ``"logits"``: ``F.cross_entropy`` on the logits that it
            returns, in their dtype, which are kept until backward has ended.
    """

    seq_len: int
    batch_size: int = 1
    accumulation: int = 1
    optimizer: str = "adamw"
    optimizer_dtype: str | None = None
    reduce_last_only: bool = False
    loss: str = "model"

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number >= 1.")
        if self.loss not in ("model", "logits"):
            raise ConfigError(f"loss is {self.loss!r}; it must be 'model' or 'logits'.")
        if self.optimizer_dtype not in (None, *DTYPES):
            raise ConfigError(f"optimizer_dtype is {self.optimizer_dtype!r}; it must be one of {', '.join(DTYPES)}.")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on each data-parallel rank."""
        return self.seq_len * self.batch_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
