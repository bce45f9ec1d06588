"""The Triton kernels and their launch configurations. Their torch twins are in `backends.reference`."""

from triton import knobs

if knobs.runtime.interpret:
    from moe_ep.kernels.interpreter import mend

    mend()
