"""Small programs that stand in for vLLM, SGLang and tokenspeed: their flags, meeting, readiness, log and HTTP API.

    python program.py vllm serve MODEL ... | sglang ... | tokenspeed ...

Node 0 waits for the other nodes at the meeting's address, says in its log what the engine says, and answers requests.
Asked for /hang, it stops where it is.
ENGINE_TEST in the environment: "die-loading" lets the last node's part die while it loads, "die-serving" once asked for
/die, "silent" answers with empty text, "own-ranks" ends if it sees the variables of a rank.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BAR = "Loading safetensors checkpoint shards: {percent:3d}% Completed | {done}/{total} [00:00<00:00]"
MODE = os.environ.get("ENGINE_TEST", "")


def vllm(argv: list[str]) -> tuple[argparse.Namespace, tuple[str, int] | None, int]:
    parser = argparse.ArgumentParser("vllm")
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    for flag in ("--tensor-parallel-size", "--nnodes", "--node-rank", "--master-port", "--max-model-len", "--port"):
        parser.add_argument(flag, type=int, default=0)
    for flag in ("--max-num-seqs", "--distributed-timeout-seconds", "--data-parallel-size", "--data-parallel-rpc-port"):
        parser.add_argument(flag, type=int, default=0)
    for flag in ("--data-parallel-size-local", "--data-parallel-start-rank"):
        parser.add_argument(flag, type=int, default=0)
    for flag in ("--master-addr", "--data-parallel-address", "--kv-cache-dtype", "--tokenizer-mode", "--host"):
        parser.add_argument(flag)
    for flag in ("--served-model-name", "--distributed-executor-backend", "--moe-backend"):
        parser.add_argument(flag)
    for flag in ("--headless", "--enable-expert-parallel", "--enforce-eager"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args(argv)
    args.api_key = os.environ.get("VLLM_API_KEY")
    if args.data_parallel_size:
        nodes = args.data_parallel_size // args.data_parallel_size_local
        args.node_rank = args.data_parallel_start_rank // args.data_parallel_size_local
        meeting = (args.data_parallel_address, args.data_parallel_rpc_port)
    else:
        nodes, meeting = args.nnodes or 1, (args.master_addr, args.master_port)
    if args.headless != (args.node_rank > 0):
        parser.error("the nodes but the first are headless")
    return args, meeting if nodes > 1 else None, nodes


def sglang(argv: list[str]) -> tuple[argparse.Namespace, tuple[str, int] | None, int]:
    parser = argparse.ArgumentParser("sglang.launch_server")
    for flag in ("--tp-size", "--ep-size", "--nnodes", "--node-rank", "--attn-dp-size", "--port", "--dist-timeout"):
        parser.add_argument(flag, type=int, default=1)
    for flag in ("--context-length", "--max-running-requests"):
        parser.add_argument(flag, type=int)
    for flag in ("--model-path", "--served-model-name", "--dist-init-addr", "--host", "--api-key"):
        parser.add_argument(flag)
    parser.add_argument("--enable-metrics", action="store_true")
    args = parser.parse_args(argv)
    args.model = args.model_path
    host, _, port = args.dist_init_addr.rpartition(":")
    return args, (host, int(port)) if args.nnodes > 1 else None, args.nnodes


def tokenspeed(argv: list[str]) -> tuple[argparse.Namespace, tuple[str, int] | None, int]:
    parser = argparse.ArgumentParser("ts")
    parser.add_argument("serve", choices=["serve"])
    for flag in ("--nnodes", "--node-rank", "--nprocs-per-node", "--world-size", "--attn-tp-size", "--port"):
        parser.add_argument(flag, type=int, required=True)
    for flag in (
        "--data-parallel-size",
        "--expert-parallel-size",
        "--moe-tp-size",
        "--max-model-len",
        "--max-num-seqs",
    ):
        parser.add_argument(flag, type=int, default=1)
    parser.add_argument("--distributed-timeout-seconds", type=int)
    for flag in ("--model", "--served-model-name", "--dist-init-addr", "--host", "--api-key"):
        parser.add_argument(flag)
    parser.add_argument("--disable-kvstore", action="store_true")
    args = parser.parse_args(argv)
    if os.environ.get("TS_SERVE_ENGINE_MODULE") != "moe_ep.plugins.tokenspeed_engine":
        parser.error("the experts' engine module is not asked for")
    if args.expert_parallel_size > 1 and args.moe_tp_size > 1:
        parser.error("MoE TP and EP cannot both be above 1")
    host, _, port = args.dist_init_addr.rpartition(":")
    return args, (host, int(port)) if args.nnodes > 1 else None, args.nnodes


def meet(meeting: tuple[str, int], node: int, nodes: int) -> list[socket.socket]:
    """Node 0 listens until all others are there; they stay connected, as the engines' parts do."""
    if node:
        deadline = time.monotonic() + 30
        while True:
            try:
                peer = socket.create_connection(meeting, 2)
                peer.settimeout(None)
                return [peer]
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
    with socket.create_server(("", meeting[1]), reuse_port=False) as server:
        return [server.accept()[0] for _ in range(nodes - 1)]


def load(model: str, node: int, nodes: int) -> None:
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        sys.exit(f"OSError: no safetensors in {model}")
    for done in range(len(files) + 1):
        print(BAR.format(percent=100 * done // len(files), done=done, total=len(files)), end="\r", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(0.05)
        if MODE == "die-loading" and node == nodes - 1 and done == 1:
            time.sleep(0.5)
            print("\ntorch.OutOfMemoryError: HIP out of memory. Tried to allocate 12.00 GiB", file=sys.stderr)
            sys.exit(1)
    print(file=sys.stderr)


class Api(BaseHTTPRequestHandler):
    args: argparse.Namespace
    engine: str
    finished = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, code: int, value: Any, kind: str = "application/json") -> None:
        body = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        if self.args.api_key is None or self.headers["Authorization"] == f"Bearer {self.args.api_key}":
            return False
        self._send(401, {"error": {"message": "Unauthorized"}})
        return True

    def do_GET(self) -> None:
        if self.path == {"tokenspeed": "/readiness"}.get(self.engine, "/health"):
            self._send(200, "")
        elif self.path == "/metrics" and self.engine != "tokenspeed":
            name = {"vllm": "vllm:request_success_total", "sglang": "sglang:num_requests_total"}[self.engine]
            tokens = f'{self.engine}:generation_tokens_total{{model_name="m"}} {4.0 * Api.finished}\n'
            text = f'# TYPE {name} counter\n{name}{{model_name="m",reason="length"}} {float(Api.finished)}\n{tokens}'
            self._send(200, text, "text/plain")
        elif self.path == "/v1/models" and not self._refused():
            self._send(200, {"object": "list", "data": [{"id": self.args.served_model_name, "object": "model"}]})
        elif self.path == "/hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.path == "/die":
            print("Fatal Python error: Segmentation fault", flush=True)
            os._exit(139)
        elif self.path != "/v1/models":
            self._send(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        if body["model"] != self.args.served_model_name:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        Api.finished += 1
        words = [] if MODE == "silent" else [" Paris", ".", " It", " is", " a", " city"][: body["max_tokens"]]
        usage = {"prompt_tokens": 6, "completion_tokens": len(words)}
        if not body.get("stream"):
            choice = {"index": 0, "text": "".join(words), "finish_reason": "length"}
            self._send(200, {"object": "text_completion", "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces: list[Any] = [{"choices": [{"index": 0, "text": word}]} for word in words]
        for piece in [*pieces, {"choices": [], "usage": usage}]:
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


def main() -> None:
    if MODE == "own-ranks" and (seen := [n for n in os.environ if n == "LOCAL_RANK" or n.startswith("SLURM_")]):
        sys.exit(f"took itself for a rank: {', '.join(sorted(seen))}")
    engine = sys.argv[1]
    args, meeting, nodes = {"vllm": vllm, "sglang": sglang, "tokenspeed": tokenspeed}[engine](sys.argv[2:])
    print(f"{engine} node {args.node_rank} of {nodes}: {' '.join(sys.argv[2:])}", flush=True)
    peers = meet(meeting, args.node_rank, nodes) if meeting else []
    load(args.model, args.node_rank, nodes)
    if args.node_rank:
        peers[0].recv(1)  # until node 0's part ends
        return
    Api.args, Api.engine = args, engine
    server = ThreadingHTTPServer((args.host, args.port), Api)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    said = {"vllm": "Application startup complete.", "sglang": "The server is fired up and ready to roll!"}
    print(said.get(engine, f"ts serve ready on http://{args.host}:{args.port}"), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
