"""What all styles share: the facts that a style states, cutting a module's parameters, wrapping its forward.

Inside a tensor-parallel model every parameter is a DTensor on the ``tp`` mesh, replicated ones too, so that optimizers,
gradient clipping and FSDP2 see one kind of parameter. The forward passes work on plain local tensors: a style hands the
module its local parameters, runs the original forward, and does the collectives at the boundary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.runtime.forward import Around, Forward, local_parameters, parameters_as, wrap_forward
from shardwright.distributed.runtime.regions import SequenceLength, SharedInput
from shardwright.distributed.styles.cuts import Cut
from shardwright.distributed.styles.traffic import Sent, Site


class LocalParameters(Around):
    """Run the module with its own parameters as this rank's local tensors."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with parameters_as(module, local_parameters(module)):
            return forward(*args, **kwargs)


@dataclass(frozen=True)
class Place:
    """Where a plan puts a style, as far as that decides what the style means there.

    Attributes:
        module: the module.
        name: its name in the model.
        head: whether it is the output head.
        in_block: whether it is inside of a repeated block.
        sequence_parallel: whether the residual stream is split along the sequence.
        rotary_width: features of the rotary key of multi-head latent attention; None where the config states none.
    """

    module: nn.Module
    name: str
    head: bool
    in_block: bool
    sequence_parallel: bool
    rotary_width: int | None


class Style(ParallelStyle):
    """A torch ``ParallelStyle`` that is exact under plain ``loss.backward()``, with everything that is known about it.

    To add one: a subclass with a ``name``, its facts and methods, and a line in ``_CLASSES`` of
    :mod:`shardwright.distributed.styles`. The planner, the replay, the executor and the estimate ask these facts; none
    of them lists styles.

    Attributes:
        name: in a plan.
        aliases: names that plans written for older libraries use for it.
        reads: it reads a replicated tensor whose gradient must be summed; readers of one input share that sum.
        writes: its output is a sum over the ranks (or what would be one), which ends a region.
        input_is_slice: it takes this rank's slice of the features.
        on_whole_input: the style that does the same with an input that is whole.
        output_is_slice: it hands on this rank's slice of the features.
        rank_local: all of its work is this rank's share, so that it may stand in a direct region.
        sums: what goes in and what comes out is replicated, whatever is cut inside.
        partial_gradients: the gradients of its replicated parameters are sums over the ranks.
        sums_output_gradient: it sums the gradient of (a part of) its own output.
        experts: it is for modules that hold experts.
        table: look-ups in a table that is cut over its rows, and that other code may read.
        parameters_only: it says nothing about a module without parameters.
        for_adapted: it may stand on a layer that has adapters, and act for all that is inside.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    input_is_slice: ClassVar[bool] = False
    on_whole_input: ClassVar[str | None] = None
    output_is_slice: ClassVar[bool] = False
    rank_local: ClassVar[bool] = False
    sums: ClassVar[bool] = False
    partial_gradients: ClassVar[bool] = False
    sums_output_gradient: ClassVar[bool] = False
    experts: ClassVar[bool] = False
    table: ClassVar[bool] = False
    parameters_only: ClassVar[bool] = False
    for_adapted: ClassVar[bool] = False

    as_written: str  # the style string it was made from
    inside: bool = False  # the layer is a part of an adapted one, which reads the input and writes the sum for it
    plan: ParallelPlan | None = None  # which it was taken from, where that says more than a dict of styles can
    shared: SharedInput
    length: SequenceLength | None = None

    @classmethod
    def written_options(cls, argument: str) -> dict[str, Any] | None:
        """The options that ``argument`` in ``name:argument`` stands for; None where it means nothing."""
        return None

    def specialised(self, place: Place) -> tuple[str, dict[str, Any]] | None:
        """The name and options of the style that this one stands for at ``place``; None where it is itself."""
        return None

    def check(self, module: nn.Module, name: str, size: int) -> None:
        """Raise PlanError where the style cannot run ``module`` on ``size`` ranks. Called before anything changes."""

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        """Where the module's own parameter goes on the ``tp`` axis. Replicated, unless the style says otherwise."""
        return Replicate()

    def cut_in(self, width: int) -> Cut | None:
        """How the ``width`` features of its input are dealt out to the ranks; None where each has them all."""
        return None

    def cut_out(self, width: int) -> Cut | None:
        """How the ``width`` features of its output are dealt out to the ranks; None where each has them all."""
        return None

    def sent(self, site: Site) -> Iterable[Sent]:
        """The collectives of its own in a micro-batch. What reading an input sends is not among them."""
        return ()

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        """What happens around the module's forward."""
        return LocalParameters()

    def bound(self, shared: SharedInput, length: SequenceLength | None) -> Self:
        """The style as a part of a region.

        Args:
            shared: the region's shared input.
            length: under sequence parallelism, the length of the block's sequence, where this layer is the one that
                gathers it (a reader) or leaves its output split (a writer).
        """
        bound = copy.copy(self)
        bound.shared, bound.length = shared, length
        return bound

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if "shared" not in self.__dict__:  # outside of a region: the only reader of its input
            return self.bound(SharedInput(), None)._apply(module, device_mesh)
        self.check(module, type(module).__name__, device_mesh.size())
        around = self.around(module, device_mesh)
        for name, param in module._parameters.items():
            if param is not None and not isinstance(param, DTensor):  # bare parameters with a style come first
                distribute_parameter(module, name, device_mesh, self.placement(module, name))
        wrap_forward(module, around)
        return module


def distribute_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Make ``module.<name>`` a DTensor with ``placement`` on ``mesh``, from this rank's own full copy.

    No data is sent: the ranks' copies are equal (:mod:`.guards.agreement` checks that they are).
    """
    param = module._parameters[name]
    assert param is not None
    data = distribute_tensor(param.detach(), mesh, [placement], src_data_rank=None)
    local = data.to_local()
    if not local.is_meta and local.untyped_storage().nbytes() > local.numel() * local.element_size():
        # A slice that still holds the whole tensor's memory.
        data = DTensor.from_local(
            local.clone(), mesh, [placement], run_check=False, shape=data.shape, stride=data.stride()
        )
    new = nn.Parameter(data, requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    module._parameters[name] = new


def written_number(option: str, argument: str) -> dict[str, Any] | None:
    """``{option: 3}`` for ``"3"``; None for what is no whole number above 0."""
    return {option: int(argument)} if argument.isdigit() and int(argument) > 0 else None
