"""The Triton kernels and their launch configurations. Their torch twins are in `backends.reference`."""
