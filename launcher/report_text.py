"""A report in words: the verdict in a line, rows for the terminal, Markdown."""

import re
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from launcher.units import figure, size


def check_rows(report: dict[str, Any]) -> list[list[str]]:
    """A check job's lines: tokens, backend, µs, error, share of the first backend's bits, distance from them."""
    return [
        [str(c["tokens"]), c["kernel"], f"{c['us']:,.1f}", f"{c['error']:.1e}", f"{c['same']:.2%}", f"{c['apart']:.1e}"]
        for c in (report.get("check") or {}).get("checks", [])
    ]


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(section, what, result) rows: selector, parity, memory per rank, throughput, and the failure if any."""
    rows = _device_rows(report)
    selector = report["selector"]
    if selector:
        rows += [
            (
                "selector",
                f"{selector['arch']}/{selector['quant']} {c['impl']}",
                f"{c['verdict']}: {c['reason']}",
            )
            for c in selector["candidates"]
        ]
        for choice in selector.get("comm", {}).get("choices", ()):
            rows.append(("selector", f"strategy at batch {choice['tokens']}", f"{choice['name']}: {choice['why']}"))
        if selector.get("launch"):
            rows.append(("selector", "launch configurations", selector["launch"]["table"]))
    if report["tune"]:
        rows.append(("tune", "table", f"{report['tune']['table']}: {report['tune']['source']}"))
        rows += [
            ("tune", f"up to {line['rows']:g} rows an expert" if line["rows"] < 1e6 else "more", line["config"])
            for line in report["tune"]["regimes"]
        ]
    rows += [
        ("check", f"{tokens} tokens, {kernel}", f"{us} µs; error {error}; {same} the first's bits, {apart} apart")
        for tokens, kernel, us, error, same, apart in check_rows(report)
    ]
    parity = report["parity"]
    if parity:
        rows += [
            (
                "parity",
                f"layer {number} ({line['routing']} routing)",
                _against(line["relative_error"], parity["tolerance"]),
            )
            for number, line in parity["layers"].items()
        ]
    rows += [
        (
            "memory",
            f"rank {line['rank']}",
            f"{held_against_planned(line)}; process {size(line['process_resident'])}",
        )
        for line in report["memory"]
    ]
    rows += [
        (
            "throughput",
            f"batch {line['batch_size']}",
            f"{line['total_token_throughput']:,.1f} tokens/s; {line['us_per_layer']:,.0f} µs per layer "
            f"({line['us_per_layer_min']:,.0f}…{line['us_per_layer_max']:,.0f})"
            + (f", {line['graph_us_per_layer']:,.0f} in a CUDA graph" if line.get("graph_us_per_layer") else ""),
        )
        for line in report["throughput"]
    ]
    rows += _service_rows(report.get("service"))
    rows += [
        ("communication", f"batch {line['tokens']}", _communication(line)) for line in report.get("communication", ())
    ]
    load = report["expert_load"]
    if load:
        worst = min(load["balance"], key=load["balance"].__getitem__)
        rows.append(("expert load", "ranks", f"{_balance(load)} mean/max tokens, averaged over the layers"))
        rows.append(("expert load", f"layer {worst}", f"{load['balance'][worst]:.2f} mean/max tokens, the least even"))
    failure = report["failure"]
    if failure:
        where = [] if failure["rank"] is None else [f"rank {failure['rank']}"]
        where.append(f"stage {failure['stage']}")
        rows.append(("failure", ", ".join(where), f"{failure['error_type']}: {failure['error']}"))
        if failure["diagnosis"]:
            rows.append(("failure", "cause", failure["diagnosis"]["cause"]))
            rows.append(("failure", "fix", failure["diagnosis"]["fix"]))
    return rows


def _service_rows(service: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if service is None:
        return []
    again = f", {service['restarts']} restarts" if service["restarts"] else ""
    times = f"{service['prefill_ms']:,.0f} ms for the prompt, {service['decode_ms']:,.0f} ms a token"
    ends = ", ".join(f"{count} {name}" for name, count in sorted(service["requests"].items())) or "none"
    return [
        ("service", "ready", f"after {service['ready_s']:,.1f} s{again}"),
        ("service", "first answer", f"{times}{'; as recorded' if service['as_recorded'] else ''}"),
        ("service", "requests", ends),
        ("service", "tokens", f"{service['prompt_tokens']:,} read, {service['answer_tokens']:,} answered"),
    ]


def _communication(line: dict[str, Any]) -> str:
    """Every strategy's measured and predicted µs, and those of a layer; the one that is taken with a star."""

    def shown(one: dict[str, Any]) -> str:
        us = one["dispatch_us"] + one["combine_us"]
        predicted = one["predicted_dispatch_us"] + one["predicted_combine_us"]
        layer = f", layer {one['layer_us']:,.0f} µs" if one.get("layer_us") is not None else ""
        return f"{one['strategy']}{'*' * (one['strategy'] == line['chosen'])} {us:,.0f} ({predicted:,.0f}) µs{layer}"

    text = "; ".join(map(shown, line["strategies"]))
    said = f"{text}; the choice (*) is {line['over_best']:.0%} above the best"
    if line.get("agreed") is False:
        said += f" ({line['rounds']} rounds did not agree on it)"
    if line.get("over_model") is None:
        return said
    return f"{said}, the cost model's alone was {line['over_model']:.0%}"


def _balance(load: dict[str, Any]) -> str:
    before = load.get("balancedness_in_order")
    moved = before is not None and abs(before - load["balancedness"]) > 1e-9
    return f"{load['balancedness']:.2f}" + (f", {before:.2f} with experts in order," if moved else "")


def _device_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each kind of device with the number of ranks on it, and whether kernels were interpreted there."""
    kinds: dict[str, int] = {}
    for rank in report["ranks"]:
        found = rank["environment"]
        if "device_name" in found:
            name = f"{found['device_name']} ({found['arch']})"
            if found["env"].get("TRITON_INTERPRET") == "1":
                name += "; Triton's interpreter: its times tell nothing about a GPU's"
            kinds[name] = kinds.get(name, 0) + 1
    return [("device", f"{count} rank{'s'[: count != 1]}", name) for name, count in kinds.items()]


def headline(report: dict[str, Any]) -> str:
    """The verdict in one line."""
    run, failure = report["run"], report["failure"]
    text = f"{run['name']} {run['id']}: {run['state']}"
    if failure:
        on = f" on {failure['host']}" if failure["host"] else ""
        text += f" in stage {failure['stage']}"
        if failure["rank"] is not None:
            text += f", first at rank {failure['rank']}{on}"
    return text


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    run = report["run"]
    lines = [f"# {headline(report)}", ""]
    failure = report["failure"]
    if failure:
        lines += [*_fenced([f"{failure['error_type']}: {failure['error']}"]), ""]
        if failure["diagnosis"]:
            lines += [f"Cause: {failure['diagnosis']['cause']}. Fix: {failure['diagnosis']['fix']}.", ""]
        if failure["log"]:
            lines += [f"Last lines of {failure['log']}:", "", *_fenced(failure["log_tail"]), ""]
    lines += _markdown_table(("", "", ""), [list(row) for row in summary_rows(report)])
    if report["throughput"]:
        lines += ["## Throughput and latency", "", what_is_timed(report), ""]
        lines += _markdown_table(THROUGHPUT_HEADS, throughput_rows(report))
    if report["memory"]:
        lines += ["## Memory, bytes", ""]
        lines += _markdown_table(("rank", "planned", "held", "peak", "process"), memory_rows(report))
        lines += [*_planned_lines(report), *_work_lines(report), ""]
    if report["expert_load"]:
        lines += [f"## Expert load of {report['expert_load']['tokens']} seeded random tokens", ""]
        lines += _markdown_table(LOAD_HEADS, load_rows(report))
        counts = report["expert_load"]["by_layer"].items()
        lines += ["Routes by expert, from expert 0 on:", ""]
        lines += [*_fenced([f"layer {layer}: {' '.join(map(str, routes))}" for layer, routes in counts]), ""]
    lines += ["## Ranks", ""]
    heads = ("rank", "host", "device", "EP group", "experts", "stages: seconds, and when begun")
    lines += _markdown_table(heads, [_rank_row(r) for r in report["ranks"]])
    if moving_rows(report):
        lines += ["## Load and communication", "", *_markdown_table(("", ""), moving_rows(report))]
    lines += ["## Environment and versions", "", *_markdown_table(("", ""), environment_rows(report))]
    lines += ["## To repeat it", "", "```", shlex.join(run["command"]), "```", ""]
    lines += [
        *(
            f"- attempt {s['attempt']}: job {s['job_id']}, git revision {s['git_revision']}"
            for s in report["submissions"]
        ),
        f"- planned at git revision {run['git_revision']}, seed {run['seed']}, checkpoint `{run['checkpoint']}`",
        f"- started {run['started']}, last event {run['last_event']}",
        "- the configuration as resolved stands in report.json under `config`",
    ]
    return "\n".join(lines) + "\n"


THROUGHPUT_HEADS = (
    "batch",
    "tokens/s",
    "tokens/s/GPU",
    "latency mean, ms",
    "median",
    "p99",
    "µs/layer (spread)",
    "in a CUDA graph",
    "floor",
    "combine",
    "passes",
)
LOAD_HEADS = ("layer", "experts, mean/max tokens", "busiest expert", "ranks, mean/max tokens")


def what_is_timed(report: dict[str, Any]) -> str:
    """What the numbers of the sweep are numbers of."""
    first = report["throughput"][0]
    return (
        f"Through the {first['layers']} loaded MoE layers alone (router, experts, combine, shared expert); the slowest "
        "rank of each pass. The floor is what the packed experts that are hit take to read at the device's copy rate, "
        "or their matmuls at its matmul rate, whichever is longer; it and the combine are µs of a layer. The spread is "
        "of the fastest and the slowest pass. Up to 512 tokens a GPU also replays passes from a CUDA graph, as engines "
        "decode: without what the host takes to launch."
    )


def throughput_rows(report: dict[str, Any]) -> list[list[str]]:
    """A row a batch size, under THROUGHPUT_HEADS."""
    return [
        [
            str(line["batch_size"]),
            figure(line["total_token_throughput"]),
            figure(line["tokens_per_s_per_gpu"]),
            figure(line["mean_latency_ms"]),
            figure(line["median_latency_ms"]),
            figure(line["p99_latency_ms"]),
            f"{line['us_per_layer']:,.0f} ({line['us_per_layer_min']:,.0f}…{line['us_per_layer_max']:,.0f})",
            figure(line.get("graph_us_per_layer")),
            figure(line["floor_us_per_layer"]),
            figure(line["combine_us"]),
            f"{line['completed']}/{line['requested']}",
        ]
        for line in report["throughput"]
    ]


def held_against_planned(line: dict[str, Any]) -> str:
    """What a rank holds beside what was planned for it."""
    held, planned = line["measured_total"], line["planned_total"]
    return f"{size(held)} held, {size(planned)} planned" + (f" ({held / planned - 1:+.1%})" if planned else "")


def memory_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rank, bytes planned, held, at the peak of the device's allocator, of the process."""
    keys = ("planned_total", "measured_total", "device_peak", "process_resident")
    return [
        [str(line["rank"]), *("–" if line[key] is None else f"{line[key]:,}" for key in keys)]
        for line in report["memory"]
    ]


def load_rows(report: dict[str, Any]) -> list[list[str]]:
    """A row a layer, under LOAD_HEADS."""
    load = report["expert_load"]
    rows = []
    for layer, routes in load["by_layer"].items():
        ranks = load["by_rank"][layer]
        even = sum(ranks) / len(ranks) / max(ranks) if max(ranks) else 1.0
        busiest = routes.index(max(routes))
        rows.append([layer, f"{load['balance'][layer]:.2f}", f"{busiest}: {max(routes)} routes", f"{even:.2f}"])
    return rows


def moving_rows(report: dict[str, Any]) -> list[list[str]]:
    """What loading took, and what the combine takes of a layer."""
    rows = []
    loads = [
        (rank["stages"]["weights"]["seconds"], rank["rank"], rank["weights"].get("bytes_read"))
        for rank in report["ranks"]
        if rank["stages"].get("weights", {}).get("state") == "done"
    ]
    if loads:
        seconds, rank, read = max(loads)
        rate = f", {size(read / seconds)}/s of {size(read)}" if read and seconds else ""
        middle = median(took for took, _, _ in loads)
        rows.append(
            ["weights loaded", f"{middle:,.2f} s in the median; {seconds:,.2f} s on rank {rank}, the slowest{rate}"]
        )
    for line in report["throughput"]:
        if line["combine_us"] is not None:
            share = 100 * line["combine_us"] / line["us_per_layer"]
            text = f"{figure(line['combine_us'])} µs, {figure(share)} % of a layer's time"
            rows.append([f"combine of batch {line['batch_size']}", text])
    return rows


def environment_rows(report: dict[str, Any]) -> list[list[str]]:
    """What the ranks run on: a row for each thing, and each different answer with the ranks that gave it."""
    rows = []
    for key in ("device_name", "arch", "system", "cpus"):
        answers: dict[str, list[int]] = {}
        for rank in report["ranks"]:
            if key in rank["environment"]:
                answers.setdefault(str(rank["environment"][key]), []).append(rank["rank"])
        several = len(answers) > 1
        said = [f"{a} (ranks {', '.join(map(str, r))})" if several else a for a, r in answers.items()]
        if said:
            rows.append([key.replace("_", " "), "; ".join(said)])
    rates = [rank["environment"]["rates"] for rank in report["ranks"] if "rates" in rank["environment"]]
    if rates:
        rows.append(["copy rate, slowest rank", f"{size(min(r['copy_bytes_per_s'] for r in rates))}/s"])
        rows.append(["matmul rate, slowest rank", f"{min(r['matmul_flop_per_s'] for r in rates) / 1e12:,.3g} TFLOP/s"])
    rows += [[name, version] for name, version in versions(report).items()]
    first = next((rank for rank in report["ranks"] if variables(rank)), None)
    if first:
        rows += [[name, value] for name, value in variables(first).items()]
    return rows


def variables(rank: dict[str, Any]) -> dict[str, str]:
    """The environment variables that a rank told of."""
    found: dict[str, str] = rank["environment"].get("env", {})
    return found


def _rank_row(rank: dict[str, Any]) -> list[str]:
    stages = ", ".join(_stage(name, stage) for name, stage in rank["stages"].items())
    experts = f"{rank['experts'][0]}–{rank['experts'][1] - 1}"
    device = rank["environment"].get("device_name", "")
    return [str(rank["rank"]), rank["host"] or "", device, str(rank["ep_group"]), experts, stages]


def _stage(name: str, stage: dict[str, Any]) -> str:
    seconds = "…" if stage["seconds"] is None else stage["seconds"]
    return f"{name} {seconds}" + ("" if stage["begun_s"] is None else f" from {stage['begun_s']}")


def _planned_lines(report: dict[str, Any]) -> list[str]:
    """What was planned, by item: a line for all ranks of which it is the same."""
    ranks: dict[str, list[int]] = {}
    for line in report["memory"]:
        text = ", ".join(f"{item} {count:,}" for item, count in line["planned"].items())
        ranks.setdefault(text, []).append(line["rank"])
    return [
        f"- planned for rank{'s'[: len(alike) > 1]} {', '.join(map(str, alike))}: {text}"
        for text, alike in ranks.items()
    ]


def versions(report: dict[str, Any]) -> dict[str, str]:
    """Packages and runtimes, of the first rank that told its own."""
    for rank in report["ranks"]:
        environment = rank["environment"]
        if "packages" in environment:
            versions = {"python": environment["python"], **environment["packages"]}
            versions |= {k: environment[k] for k in ("hip", "cuda")}
            return {name: version for name, version in versions.items() if version}
    return {}


def _against(error: float | None, tolerance: float) -> str:
    if error is None:
        return "NOT A NUMBER"
    return f"{error:.2e} {'≤' if error <= tolerance else 'ABOVE'} {tolerance:g}"


def _fenced(lines: Sequence[str]) -> list[str]:
    """As they are, between fences that are longer than any in them."""
    longest = max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *lines, fence]


def _markdown_table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows), ""] if rows else []


def _work_lines(report: dict[str, Any]) -> list[str]:
    """What the work took beside the weights: of each part the rank on which plan and measurement differ most."""
    found: dict[str, list[tuple[float, str]]] = {}
    for line in report["memory"]:
        for part, took in line.get("work", {}).items():
            if took["measured"] is not None and (took["measured"] or took["planned"]):
                off = abs(took["measured"] - took["planned"]) / max(took["planned"], 1)
                found.setdefault(part, []).append((off, work_against_planned(line["rank"], took)))
    return [f"- {part}: {max(ranks)[1]}" for part, ranks in found.items()]


def work_against_planned(rank: int, took: dict[str, int]) -> str:
    """Bytes of a part of a rank's work beside what was planned for it."""
    measured, planned = took["measured"], took["planned"]
    share = f" ({measured / planned - 1:+.1%})" if planned else ""
    return f"{measured:,} measured, {planned:,} planned{share}, on rank {rank}, which differs most"
