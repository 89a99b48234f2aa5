"""``Precision``: the dtypes of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.distributed.fields import Named, only_known
from shardwright.errors import ConfigError
from shardwright.settings import HasShortForms
from shardwright.untrusted import shown

DTYPES = ("float32", "bfloat16", "float16")
MODEL = "model"


@dataclass(frozen=True)
class Precision(Named, HasShortForms):
    """Dtypes of a training step. ``"model"`` is the dtype that the model's parameters have; by default nothing is cast.

    The dtype in which parameters, and with them an optimizer's state, are kept is the model's, and nothing here changes
    it.

    Attributes:
        param: dtype in which parameters are gathered and computed with.
        reduce: dtype in which gradients are summed over the data-parallel ranks.
        output: dtype of what the model returns.
    """

    param: str = MODEL
    reduce: str = MODEL
    output: str = MODEL

    def __post_init__(self) -> None:
        for name in ("param", "reduce", "output"):
            value = getattr(self, name)
            if value not in (MODEL, *DTYPES):
                allowed = ", ".join((MODEL, *DTYPES))
                raise ConfigError(f"precision.{name} is {shown(value)}; it must be one of {allowed}.")

    def settled(self, dtypes: Sequence[str]) -> Precision:
        """This precision for a model whose parameters are of ``dtypes``, the commonest first.

        Every ``"model"`` is replaced by the commonest. Where nothing is cast, the result is ``Precision()``.
        """
        if self == Precision() or not dtypes:
            return Precision()
        own = dtypes[0]
        named = Precision(*(own if dtype == MODEL else dtype for dtype in (self.param, self.reduce, self.output)))
        return Precision() if len(dtypes) == 1 and named == Precision(own, own, own) else named


FLOAT32 = Precision(param="float32", reduce="float32", output="float32")
BF16_MIXED = Precision(param="bfloat16", reduce="float32", output="float32")
PRECISIONS = {"model": Precision(), "float32": FLOAT32, "bf16": BF16_MIXED}


def precision_of(value: Any) -> Precision:
    if isinstance(value, Precision):
        return value
    if isinstance(value, str):
        if value not in PRECISIONS:
            raise ConfigError(
                f"precision is {shown(value)}; it must be one of {', '.join(PRECISIONS)}, or a mapping with the keys "
                "param, reduce and output."
            )
        return PRECISIONS[value]
    if isinstance(value, Mapping):
        only_known(Precision, value)
        return Precision(**value)
    raise ConfigError(f"precision is {shown(value)}; it must be a name or a mapping.")
