"""A kernel with its grid and constants, whose launches after the first cost the host little."""

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

_LAUNCHERS = ("triton.backends.nvidia.driver", "triton.backends.amd.driver")
"""Modules whose launchers take a pointer as a number, and then do not ask the driver where it points."""


class BoundLaunch:
    """Launches of one kernel that differ in their tensors and numbers only.

    The first compiles it, or finds it compiled, for the arguments' types and alignments; all further ones must have
    the same. It skips what Triton does on each launch to find the kernel again, which takes longer than the kernel.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        constants: dict[str, Any],
        *,
        warps: int = 4,
        stages: int = 3,
        pdl: bool = False,
        **options: int,
    ) -> None:
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, **options}
        if pdl:
            self.options["launch_pdl"] = True
        self._compiled: CompiledKernel | None = None
        self._values: tuple[Any, ...] = ()
        self._by_address = False

    def __call__(self, *args: Any) -> None:
        """Launch with the arguments that are not constants, in their order."""
        if self._compiled is None:
            compiled = self.kernel[(self.programs,)](*args, **self.constants, **self.options)
            if isinstance(compiled, CompiledKernel):  # the interpreter gives nothing
                names = self.kernel.arg_names[len(args) :]
                self._compiled, self._values = compiled, tuple(self.constants[name] for name in names)
                self._by_address = type(compiled.run).__module__ in _LAUNCHERS
        else:
            if self._by_address:
                args = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
            self._compiled[(self.programs, 1, 1)](*args, *self._values)
