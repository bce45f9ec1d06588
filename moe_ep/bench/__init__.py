"""Time of the experts' kernels beside the floor that memory and matrix units set: `python -m moe_ep.bench`."""
