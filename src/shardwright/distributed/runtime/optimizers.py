"""Classes of optimizers that are known not to work on sharded parameters: refused by name, before any step.

Others are refused in the step, where they do what DTensor has no rule for (:mod:`.checked`).
"""

from __future__ import annotations

from shardwright.errors import UnsupportedError

# Packages whose optimizers are kernels over whole tensors: they know no DTensor.
_KERNELS = ("bitsandbytes", "lomo_optim", "torchao", "galore_torch", "apollo_torch", "grokadamw")
# Name -> packages; these take rows and columns of whole matrices.
_WHOLE = {"Adafactor": ("torch", "transformers")}


def require_shardable(cls: type) -> None:
    """Raise UnsupportedError for a class of optimizers that cannot work on sharded parameters."""
    package = cls.__module__.partition(".")[0]
    if package in _KERNELS or package in _WHOLE.get(cls.__name__, ()):
        raise UnsupportedError(
            f"{cls.__name__} of {package} works on whole tensors, and the parameters are sharded. Use another of "
            "torch's optimizers, such as AdamW with fused=True (transformers' optim='adamw_torch_fused'): its state is "
            "sharded along with the parameters."
        )
