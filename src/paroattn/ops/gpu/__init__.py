"""The backend for GPUs, from the bottom: device, configs, rows, prologue, forward, hopper, pack, launch, backend."""
