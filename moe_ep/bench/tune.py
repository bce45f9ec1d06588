"""python -m moe_ep.bench.tune: measure launch configurations on this device and write its table."""

from pathlib import Path
from typing import Annotated, cast, get_args

import torch
import typer

from moe_ep import tables
from moe_ep.backends.call import Impl, table_name
from moe_ep.backends.target import current_target
from moe_ep.bench.cases import SHAPES
from moe_ep.bench.contenders import CONTENDERS
from moe_ep.bench.tuner import measure, source, table_of, tuned_impl
from moe_ep.kernels.launch import LaunchConfig
from moe_ep.spec import ActivationDtype


def main(
    out: Annotated[Path, typer.Option(help="folder of tables; name it in MOE_EP_TABLES to use them")],
    shape: Annotated[str, typer.Option(help=f"of {', '.join(SHAPES)}")] = "pro-ep8",
    tokens: Annotated[list[int], typer.Option(help="seen by the rank")] = [  # noqa: B006
        *(1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192)
    ],
    quick: Annotated[bool, typer.Option(help="try a third of the tiles")] = False,
    impl: Annotated[str, typer.Option(help="gluon_kernel or triton_kernel; what runs here first")] = "",
    activations: Annotated[str, typer.Option(help="bf16, or on gfx942 fp8")] = "bf16",
) -> None:
    """Measure configurations for a rank's share of a model on this device, and write the table of its arch.

    A table that is there, or the one that is used, keeps what it has for other activations.
    """
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: there are {', '.join(SHAPES)}")
    if impl not in ("", "gluon_kernel", "triton_kernel"):
        raise typer.BadParameter(f"--impl {impl}: there are gluon_kernel, triton_kernel")
    backend = tuned_impl() if not impl else cast(Impl, impl)
    if not CONTENDERS[backend].available:
        raise typer.BadParameter(f"--impl {impl}: its kernels are CDNA3's, and this is no gfx942")
    arch = current_target().arch
    if activations not in get_args(ActivationDtype):
        raise typer.BadParameter(f"--activations {activations}: there are {', '.join(get_args(ActivationDtype))}")
    if activations == "fp8" and arch != "gfx942":
        raise typer.BadParameter(f"--activations fp8: only gfx942 multiplies them as fp8, and this is {arch}")
    kind = cast(ActivationDtype, activations)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[int, LaunchConfig] = {}
    name = table_name(arch, backend)
    path = out / f"{name}.yaml"
    before = tables.read(path) if path.exists() else tables.find(name)
    for count, timed in measure(SHAPES[shape], sorted(set(tokens)), device, quick, backend, kind):
        found[count] = timed.config
        tables.write(path, table_of(SHAPES[shape], found, source(device, shape), backend, kind, before))
        print(f"{path}: {len(found)} regimes", flush=True)


if __name__ == "__main__":
    typer.run(main)
