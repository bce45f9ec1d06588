"""LLVM's assembler for gfx942, which Triton carries: it says whether a text is an instruction of the chip."""

import os
import tempfile
from pathlib import Path

from triton._C.libtriton import amd, llvm
from triton.backends.amd import compiler

_assemble = (
    getattr(compiler, "assemble_amdgcn", None) or amd.assemble_amdgcn
)  # where it is since Triton 3.9, and before


def assemble(lines: list[str]) -> None:
    """Raises `ValueError` with LLVM's message for the first line that is no instruction of gfx942."""
    llvm.init_targets()
    for line in lines:
        message = _complaint(line)
        if message:
            raise ValueError(f"{line}: {message}")


def _complaint(line: str) -> str:
    """What LLVM writes to standard error, the process's own, about a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stderr"
        saved = os.dup(2)
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
            try:
                _assemble(f"\t{line}\n", "gfx942", "")
                return path.read_text().strip()
            except RuntimeError as error:
                return f"{path.read_text()} {error}".strip()
            finally:
                os.dup2(saved, 2)
                os.close(saved)
