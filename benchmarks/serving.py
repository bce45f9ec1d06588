"""How far a service's logits are from the dense model's, per EP size: in the ranks, and as clients get them by HTTP.

    python -m benchmarks.serving [--dtype f32] [--dtype bf16] [--gpus 2]

The dense model is transformers' own, with its own experts, on the dequantised weights in f32. Both read the same
prompts and then the dense model's answer, so each position is compared by itself. By HTTP there are the
log-probabilities of the 20 likeliest tokens of the service's own answer; they are compared as far as that is the dense
model's. In bf16 transformers' own model, all of it in bf16, is held against the same. Four ranks on the CPU, or as many
as there are GPUs. Prints a Markdown table.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from engine.model import Ranks, load
from jobs.serving import Endpoint
from moe_ep.checkpoint import Checkpoint
from moe_ep.comm import combine_for
from moe_ep.placement import Slice
from moe_ep.selector import select_backend
from moe_ep.spec import MoELayerSpec, Mxfp4Config
from moe_ep.synthetic import TINY, TINY_ATTENTION, write_checkpoint
from tests.engine.dense import dense_model, greedy

ON_CPU, ANSWER = 4, 16
LENGTHS = (5, 12, 20, 40, 80, 150, 220, 300)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CONFIG = Path(__file__).parents[1] / "configs" / "serve-tiny.yaml"


def prompt(length: int) -> list[int]:
    """Seeded tokens, none of them special."""
    return torch.randint(7, TINY.vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def ep_sizes(world: int) -> list[int]:
    """The powers of two up to the ranks."""
    return [2**power for power in range(world.bit_length()) if world % 2**power == 0]


def work(rank: int, world: int, gpus: bool, path: str, store: str, dtype: str, answers: dict[int, list[int]]) -> None:
    """One rank: logits f32 [ANSWER, V] of each prompt for each EP size."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found: dict[int, dict[int, Tensor]] = {}
    for ep in ep_sizes(world):
        groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, world, ep)]
        checkpoint = Checkpoint.open(Path(path))
        specs = {n: MoELayerSpec.of_rank(TINY, n, rank % ep, ep) for n in range(TINY.layers)}
        wanted = {"arch": None, "impl": "auto"} if gpus else {"arch": "cpu", "impl": "reference"}
        backends = {n: select_backend(s, Mxfp4Config(), **wanted) for n, s in specs.items()}
        ranks = Ranks(combine_for(ep, groups[rank // ep]), combine_for(world), Slice(rank, world))
        model = load(checkpoint, backends, ranks, device, dtype=DTYPES[dtype])
        found[ep] = {}
        for length, answer in answers.items():
            reads = [prompt(length), *([token] for token in answer[:-1])]
            found[ep][length] = torch.stack([model.forward({length: tokens})[0].cpu() for tokens in reads])
    if rank == 0:
        torch.save(found, f"{store}.found")
    dist.destroy_process_group()


def by_http(folder: Path, world: int, gpus: bool, ep: int, dtype: str) -> dict[int, dict[str, Any]]:
    """What a service of `world` ranks tells of each prompt."""
    keys = [f"run.folder={folder}", f"model.synthetic.folder={folder}/made", "engine.port=0", f"engine.dtype={dtype}"]
    keys += [f"topology.ep={ep}", f"run.name=ep{ep}-{dtype}"]
    keys += [f"topology.ranks_per_node={world}", f"topology.tp={world}"]
    keys += ["cluster=local-gpu", "backend.impl=auto"] if gpus else []
    command = [sys.executable, "-m", "launcher", "submit", str(CONFIG), *(f"--set={key}" for key in keys)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    try:
        endpoint = None
        while endpoint is None:
            if process.poll() is not None:
                sys.exit((folder / "log").read_text())
            time.sleep(0.5)
            endpoint = next(iter(map(Endpoint.load, folder.glob(f"ep{ep}-{dtype}/*"))), None)
        asked = {"model": endpoint.model, "max_tokens": ANSWER, "temperature": 0, "logprobs": 20}
        asked |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
        with httpx.Client(base_url=endpoint.url, timeout=300) as client:
            answers = {n: client.post("/v1/completions", json=asked | {"prompt": prompt(n)}) for n in LENGTHS}
        return {n: answer.raise_for_status().json()["choices"][0]["logprobs"] for n, answer in answers.items()}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def compared(told: dict[str, Any], expected: Tensor, answer: list[int]) -> tuple[int, float]:
    """How many tokens of an answer are the dense model's, and the largest difference of a log-probability that far."""
    tokens = [int(name.removeprefix("token_id:")) for name in told["tokens"]]
    same = next((i for i, pair in enumerate(zip(tokens, answer, strict=True)) if pair[0] != pair[1]), len(answer))
    worst = 0.0
    for position in range(min(same + 1, len(answer))):
        logprobs = expected[position].log_softmax(-1)
        for name, value in told["top_logprobs"][position].items():
            worst = max(worst, abs(value - float(logprobs[int(name.removeprefix("token_id:"))])))
    return same, worst


@torch.inference_mode()
def _forced(model: torch.nn.Module, length: int, answer: list[int]) -> Tensor:
    """Logits f32 [ANSWER, V] where it reads a prompt and then the answer, whatever it would say itself."""
    logits: Tensor = model(torch.tensor([prompt(length) + answer[:-1]])).logits[0].float()
    return logits[length - 1 :]


def _of_transformers(model: Any, expected: dict[int, Tensor], answers: dict[int, list[int]]) -> str:
    """The row of a model that is not served."""
    found = {length: _forced(model, length, answer) for length, answer in answers.items()}
    worst = torch.cat([(found[n] - expected[n]).abs().amax(-1) for n in LENGTHS])
    same = sum(int((found[n].argmax(-1) == torch.tensor(answers[n])).sum()) for n in LENGTHS)
    whole = sum(greedy(model, prompt(n), ANSWER)[1] == answers[n] for n in LENGTHS)
    off = f"{float(worst.max()):.3f}, {float(worst.median()):.3f}"
    return f"{off} | {same} of {len(LENGTHS) * ANSWER} | – | {whole} of {len(LENGTHS)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=[*DTYPES])
    parser.add_argument("--gpus", type=int, default=0, help="of this machine, a rank each; 0: four ranks on the CPU")
    args = parser.parse_args()
    dtypes, gpus, world = args.dtype or [*DTYPES], args.gpus > 0, args.gpus or ON_CPU
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_NVLS_ENABLE="0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", TINY, attention=TINY_ATTENTION)
        dense = dense_model(folder / "model", folder / "dense", torch.float32)
        answers = {length: greedy(dense, prompt(length), ANSWER)[1] for length in LENGTHS}
        expected = {length: _forced(dense, length, answer) for length, answer in answers.items()}
        everything = torch.stack([*expected.values()])
        count = len(LENGTHS) * ANSWER
        print(f"standard deviation of the dense logits {float(everything.std()):.2f}; {count} positions\n")
        heads = ["dtype", "EP", "logit: largest, median difference", "likeliest token the same"]
        heads += ["by HTTP: largest difference", "answers the same"]
        print("|", " | ".join(heads), "|\n" + "|---" * len(heads) + "|")
        for dtype in dtypes:
            if dtype != "f32":
                own = dense_model(folder / "model", folder / f"dense-{dtype}", DTYPES[dtype])
                print(f"| {dtype} | transformers' own | {_of_transformers(own, expected, answers)} |", flush=True)
            store = folder / f"store-{dtype}"
            given = (world, gpus, str(folder / "model"), str(store), dtype, answers)
            start_processes(work, given, world, start_method="fork")
            inside: dict[int, dict[int, Tensor]] = torch.load(f"{store}.found")
            for ep, found in inside.items():
                worst = [(found[n] - expected[n]).abs().amax(-1) for n in LENGTHS]
                same = sum(int((found[n].argmax(-1) == torch.tensor(answers[n])).sum()) for n in LENGTHS)
                told = by_http(folder, world, gpus, ep, dtype)
                http = [compared(told[n], expected[n], answers[n]) for n in LENGTHS]
                largest, middle = float(torch.cat(worst).max()), float(torch.cat(worst).median())
                whole = sum(length == ANSWER for length, _ in http)
                row = f"{largest:.3f}, {middle:.3f} | {same} of {count} | {max(w for _, w in http):.3f}"
                print(f"| {dtype} | {ep} | {row} | {whole} of {len(LENGTHS)} |", flush=True)


if __name__ == "__main__":
    main()
