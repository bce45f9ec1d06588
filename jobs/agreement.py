"""Whether all ranks run the same: request, code, packages and variables are compared by a hash before anything else."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.request import REQUEST

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

_POLL_S = 0.02
_VARIABLES = ("NCCL_", "RCCL_", "FI_", "MOE_EP_TABLES", "TRITON_INTERPRET", "HSA_")
_PER_RANK = ("NCCL_SOCKET_IFNAME", "NCCL_DEBUG_FILE", "NCCL_HOSTID")  # that may differ between hosts
_SHOWN = 80
_GRACE_S = 10.0
"""What the others wait longer than rank 0, and it for them to read its verdict."""
_VERDICT = "agreement/verdict"
_AGREED, _DIFFER, _LATE = "agreed", "differ", "late"


class DisagreementError(RuntimeError):
    """Ranks were started with different configurations; names the ranks, what differs, and both values."""


def configuration(run_dir: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all ranks: the request, the code, versions, and variables of the collectives.

    `described` is `jobs.environment.describe`'s.
    """
    found = {
        "request": _digest((run_dir / REQUEST).read_bytes()),
        "code": described["code"],
        **{f"package {name}": str(version) for name, version in described["packages"].items()},
        **{key: str(described[key]) for key in ("arch", "hip", "cuda")},
    }
    variables = {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES) and k not in _PER_RANK}
    return found | {f"variable {name}": value for name, value in sorted(variables.items())}


def agree(store: "TCPStore", rank: int, world: int, mine: Mapping[str, str], timeout_s: float) -> str:
    """Compare with all ranks. Returns the hash that they share. Every rank must call it.

    Rank 0 alone decides, of a rank that is late too, and the others wait a little longer than it does: so all end with
    the same words. It holds the store, so it leaves only when all that are here have read them.

    Raises
    ------
    DisagreementError
        On every rank, if one differs from rank 0.
    TimeoutError
        On every rank, if one does not tell its configuration; names those. On the others, if rank 0 does not decide.
    """
    text = json.dumps(dict(mine), sort_keys=True)
    digest = _digest(text.encode())
    store.set(f"agreement/told/{rank}", text)
    store.set(f"agreement/hash/{rank}", digest)
    if rank == 0:
        kind, said = _decided(store, world, mine, digest, timeout_s)
        store.set(_VERDICT, json.dumps([kind, said]))
    elif not _come(store, [_VERDICT], timeout_s + _GRACE_S):
        raise TimeoutError(f"not within {timeout_s + _GRACE_S:g} s: rank 0 comparing the configurations; see its log")
    kind, said = json.loads(bytes(store.get(_VERDICT)))
    if kind == _AGREED:
        return digest
    store.set(f"agreement/read/{rank}", "")
    if rank == 0:
        here = [r for r in range(world) if store.check([f"agreement/told/{r}"])]
        _come(store, [f"agreement/read/{r}" for r in here], _GRACE_S)
    raise TimeoutError(said) if kind == _LATE else DisagreementError(said)


def _decided(store: "TCPStore", world: int, mine: Mapping[str, str], digest: str, timeout_s: float) -> tuple[str, str]:
    """Rank 0's verdict, and its words."""
    keys = [f"agreement/hash/{r}" for r in range(world)]
    if not _come(store, keys, timeout_s):
        missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
        who = f"rank{'s'[: len(missing) > 1]} {', '.join(missing)}"
        return _LATE, f"not within {timeout_s:g} s: {who} telling its configuration; see the log"
    hashes = [bytes(one).decode() for one in store.multi_get(keys)]
    others = [r for r, one in enumerate(hashes) if one != digest]
    return (_DIFFER, _differences(store, others, mine)) if others else (_AGREED, "")


def _differences(store: "TCPStore", others: list[int], first: Mapping[str, str]) -> str:
    by_item: dict[str, list[int]] = {}
    for rank in others:
        theirs = json.loads(bytes(store.get(f"agreement/told/{rank}")))
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                text = f"{name}: {_short(theirs.get(name))} against {_short(first.get(name))} on rank 0"
                by_item.setdefault(text, []).append(rank)
    lines = [f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))}: {text}" for text, ranks in by_item.items()]
    return "the ranks were started with different configurations; " + "; ".join(lines)


def _come(store: "TCPStore", keys: list[str], timeout_s: float) -> bool:
    """Whether all keys are set within that time."""
    deadline = time.monotonic() + timeout_s
    while not store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _short(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…"
