"""What all styles share: cutting a module's parameters over the tensor-parallel ranks, and wrapping its forward.

Inside a tensor-parallel model every parameter is a DTensor on the ``tp`` mesh, replicated ones too, so that optimizers,
gradient clipping and FSDP2 see one kind of parameter. The forward passes work on plain local tensors: a style hands the
module its local parameters, runs the original forward, and does the collectives at the boundary.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from shardwright.distributed.plan import ParallelPlan
from shardwright.distributed.runtime.forward import Around, Forward, local_parameters, parameters_as, wrap_forward


class LocalParameters(Around):
    """Run the module with its own parameters as this rank's local tensors."""

    def __call__(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with parameters_as(module, local_parameters(module)):
            return forward(*args, **kwargs)


class Style(ParallelStyle):
    """A torch ``ParallelStyle`` that is exact under plain ``loss.backward()``.

    Subclasses say where each parameter goes (:meth:`placement`) and what happens around the forward (:meth:`around`).
    """

    name: ClassVar[str]
    as_written: str  # the style string it was made from
    plan: ParallelPlan | None = None  # which it was taken from, where that says more than a dict of styles can

    def placement(self, module: nn.Module, parameter: str) -> Placement:
        """Where the module's own parameter goes on the ``tp`` axis. Whole, unless the style says otherwise."""
        return Replicate()

    def check(self, module: nn.Module, name: str, size: int) -> None:
        """Raise PlanError where the style cannot run ``module`` on ``size`` ranks. Called before anything changes."""

    def around(self, module: nn.Module, mesh: DeviceMesh) -> Around:
        return LocalParameters()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
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
