"""Measuring the machine at hand, and writing what was measured as files of a device and a fabric."""
