"""What DTensor computes right, values and gradients, on tensors whose shards may be uneven: by name of the function.

Its rules for other operations are not to be relied on: torch 2.13 doubles the gradient of ``F.mse_loss`` on two shards,
averages uneven shards as if they were even, and cumulates each shard by itself. What is not listed here is computed on
whole tensors. ``tests/distributed/test_operations.py`` tries every name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

_ELEMENTWISE = """
    add sub mul div true_divide neg pow square sqrt rsqrt reciprocal abs exp expm1 log log1p log2 tanh sigmoid relu gelu
    silu softplus logsigmoid sin cos clamp clamp_min clamp_max where masked_fill eq ne lt le gt ge logical_not
    logical_and logical_or isnan isinf isfinite maximum minimum sign nan_to_num dropout
"""
_ARITHMETIC = "__add__ __sub__ __mul__ __truediv__ __pow__ __neg__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __matmul__"
_REFLECTED = "__radd__ __rsub__ __rmul__ __rtruediv__ __rpow__ __rdiv__"
_IN_PLACE = "add_ sub_ mul_ div_ clamp_ masked_fill_ zero_ copy_ __iadd__ __isub__ __imul__ __itruediv__"
_LAYOUT = """
    clone detach contiguous to type type_as float half double bfloat16 cpu cuda view view_as reshape flatten unflatten
    squeeze unsqueeze transpose permute movedim expand expand_as narrow select __getitem__ cat stack repeat t
"""
_REDUCTIONS = "sum mean var std amax amin argmax argmin logsumexp softmax log_softmax norm vector_norm all any"
_PRODUCTS = "matmul mm bmm"
_LIKE = "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full"

# torch 2.11 has no rule for these, or for their backward.
_NEWER = "max min topk index_select linear" if TorchVersion(torch.__version__) >= "2.13" else ""

KNOWN = frozenset(
    " ".join((_ELEMENTWISE, _ARITHMETIC, _REFLECTED, _IN_PLACE, _LAYOUT, _REDUCTIONS, _PRODUCTS, _LIKE, _NEWER)).split()
)

# torch adds up halves in float32 and rounds once. DTensor would round every shard's part, where float16 may overflow.
REDUCED_IN_FLOAT32 = frozenset(["sum", "mean", "var", "std", "norm", "vector_norm"])

# They draw random numbers. On whole tensors every rank draws for itself, and must draw alike.
_DRAWS = """
    multinomial bernoulli poisson binomial normal rand_like randn_like randint_like bernoulli_ normal_ uniform_ random_
    exponential_ geometric_ cauchy_ log_normal_ gumbel_softmax rrelu alpha_dropout feature_dropout
    feature_alpha_dropout dropout1d dropout2d dropout3d
"""
DRAWS = frozenset(_DRAWS.split())

# They tell something about the tensor, or act on its place in the autograd graph; nothing is computed.
_ABOUT = """
    __get__ __set__ __delete__ __len__ __repr__ __format__ __hash__ __deepcopy__ __reduce_ex__ __setstate__ size dim
    ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point is_complex is_signed
    is_same_size is_pinned is_shared is_inference get_device untyped_storage requires_grad_ retain_grad
    register_hook register_post_accumulate_grad_hook backward grad detach_ has_names
"""
ABOUT_THE_TENSOR = frozenset(_ABOUT.split())


def is_known(func: Callable[..., Any]) -> bool:
    """Whether DTensor may compute ``func``."""
    return func.__name__ in KNOWN or func.__name__ in ABOUT_THE_TENSOR


def writes(func: Callable[..., Any]) -> bool:
    """Whether ``func`` writes into its first argument."""
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")
