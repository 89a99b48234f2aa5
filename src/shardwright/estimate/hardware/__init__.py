"""Devices and fabrics as data: one file each, with where its numbers come from."""

from shardwright.estimate.hardware.load import (
    Device,
    Efficiencies,
    Fabric,
    Machine,
    known_devices,
    known_machine,
    load_fabric,
    load_machine,
)

__all__ = [
    "Device",
    "Efficiencies",
    "Fabric",
    "Machine",
    "known_devices",
    "known_machine",
    "load_fabric",
    "load_machine",
]
