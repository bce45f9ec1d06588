"""python -m moe_ep.bench.tune: measure launch configurations on this device and write its table."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_ep import tables
from moe_ep.backends.triton_kernel import current_target
from moe_ep.bench.cases import SHAPES
from moe_ep.bench.tuner import measure, source, table_of
from moe_ep.kernels.launch import LaunchConfig


def main(
    out: Annotated[Path, typer.Option(help="folder of tables; name it in MOE_EP_TABLES to use them")],
    shape: Annotated[str, typer.Option(help=f"of {', '.join(SHAPES)}")] = "pro-ep8",
    tokens: Annotated[list[int], typer.Option(help="seen by the rank")] = [  # noqa: B006
        *(1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192)
    ],
    quick: Annotated[bool, typer.Option(help="try a third of the tiles")] = False,
) -> None:
    """Measure configurations for a rank's share of a model on this device, and write the table of its arch."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: there are {', '.join(SHAPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[int, LaunchConfig] = {}
    path = out / f"{current_target().arch}.yaml"
    for count, timed in measure(SHAPES[shape], sorted(set(tokens)), device, quick):
        found[count] = timed.config
        tables.write(path, table_of(SHAPES[shape], found, source(device, shape)))
    print(f"{path}: {len(found)} regimes")


if __name__ == "__main__":
    typer.run(main)
