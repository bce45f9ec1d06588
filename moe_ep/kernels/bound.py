"""A kernel with its grid and constants, whose launches after the first cost the host little."""

from typing import Any

from triton.compiler import CompiledKernel


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

    def __call__(self, *args: Any) -> None:
        """Launch with the arguments that are not constants, in their order."""
        if self._compiled is None:
            compiled = self.kernel[(self.programs,)](*args, **self.constants, **self.options)
            if isinstance(compiled, CompiledKernel):  # the interpreter gives nothing
                names = self.kernel.arg_names[len(args) :]
                self._compiled, self._values = compiled, tuple(self.constants[name] for name in names)
        else:
            self._compiled[(self.programs, 1, 1)](*args, *self._values)
