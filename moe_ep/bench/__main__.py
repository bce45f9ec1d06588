"""python -m moe_ep.bench: times of the experts beside the floor and beside other kernels."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

from moe_ep.bench import report
from moe_ep.bench.cases import SHAPES, Routing
from moe_ep.bench.clock import Rates, measure_rates
from moe_ep.bench.contenders import CONTENDERS, OURS
from moe_ep.bench.runs import Line, time_shape

ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf", "one")


def header(device: torch.device, rates: Rates) -> dict[str, Any]:
    """Where and with what a run was made; rates in bytes/s and FLOP/s."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "copy": rates.copy,
        "matmul": rates.matmul,
    }


def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")] = ["flash-ep4", "pro-ep8"],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="seen by the rank")] = [1, 8, 32, 128, 512, 2048, 8192],  # noqa: B006
    routing: Annotated[list[str], typer.Option(help=f"of {', '.join(ROUTINGS)}")] = ["uniform"],  # noqa: B006
    kernel: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(CONTENDERS)}; all that are here")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0.1, help="seconds for each kernel and shape, then the next; none")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="where to write the lines, as they come")] = None,
    plot: Annotated[Path | None, typer.Option(help="where to draw them; takes matplotlib")] = None,
    drawn: Annotated[Path | None, typer.Option("--from", help="draw what an earlier run wrote, time nothing")] = None,
) -> None:
    """Time the experts of a rank: µs, GB/s over hit experts, TFLOP/s, ratio to the floor, error against f64.

    The floor is the larger of two times: the packed bytes of the experts that are hit, once, at the copy rate of this
    device, and the FLOPs of the local routes at its bf16 matmul rate; both rates are measured in the same run. Every op
    has other tokens, other experts and, in turn, other weights, so that no cache holds what it reads.
    """
    if drawn:
        if plot is None:
            raise typer.BadParameter("--from draws an earlier run: say where with --plot")
        report.plot(plot, *report.load(drawn))
        return
    for name, given, known in (
        ("shape", shape, SHAPES),
        ("routing", routing, ROUTINGS),
        ("kernel", kernel, CONTENDERS),
    ):
        for value in given or ():
            if value not in known:
                raise typer.BadParameter(f"--{name} {value}: there are {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = [CONTENDERS[name] for name in kernel or [OURS, *CONTENDERS] if CONTENDERS[name].available]
    if kernel is None:  # the reference takes seconds an op, and fp8 is another arithmetic
        contenders = [c for c in dict.fromkeys(contenders) if c.name != "reference" and c.activations == "bf16"]
    rates = measure_rates(device)
    about = header(device, rates)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['date']}")
    print(f"copy {rates.copy / 1e12:.2f} TB/s, bf16 matmul {rates.matmul / 1e12:.1f} TFLOP/s; times in µs")
    print(report.heading(), flush=True)
    lines: list[Line] = []
    for name in shape:
        cases = [(count, one) for one in ROUTINGS if one in routing for count in tokens]
        for line in time_shape(SHAPES[name], cases, contenders, rates, device, limit):
            lines.append(line)
            print(report.row(line), flush=True)
            if json:
                report.save(json, about, lines)
    if plot:
        report.plot(plot, about, lines)


if __name__ == "__main__":
    typer.run(main)
