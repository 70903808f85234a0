"""What runs where: meshes, processes, signals, CPU cores, chips, and the kernels that differ between platforms."""
