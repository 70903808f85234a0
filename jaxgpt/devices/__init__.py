"""Devices and processes: meshes, signals, CPU cores, chips, and the kernels that differ between platforms."""
