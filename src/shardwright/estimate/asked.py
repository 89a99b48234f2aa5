"""What a command of estimates is asked about: a model and GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.distributed.replay.reading import ModelReading
from shardwright.estimate.estimating import read_model
from shardwright.estimate.hardware import Machine, load_machine


@dataclass(frozen=True)
class Asked:
    """As the options of ``shardwright estimate`` and ``suggest`` say it.

    Attributes:
        model: a checkpoint folder, a ``config.json`` or a model type.
        gpus: how many, one for each rank.
        gpu: name of a device, or path of a file that describes one.
        weights: dtype in which parameters, gradients and the optimizer's state are kept.
        lora: rank of adapters; 0 trains the whole model.
        network: the fabric between nodes.
        gpus_per_node: instead of what is usual for the device.
    """

    model: str
    gpus: int
    gpu: str
    weights: str
    lora: int
    network: str
    gpus_per_node: int | None

    def machine(self) -> Machine:
        """Raises ConfigError where there is no such device or fabric."""
        return load_machine(self.gpu, network=self.network, gpus_per_node=self.gpus_per_node)

    def reading(self) -> ModelReading:
        """The model on meta. Raises ConfigError where there is none, or adapters without peft."""
        return read_model(self.model, self.weights, self.lora)
