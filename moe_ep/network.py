"""How the ranks of a group are spread over nodes, how fast their links and devices are. Needs no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`ranks` of an EP group, `per_node` of them on each node."""

    ranks: int
    per_node: int

    @classmethod
    def of(cls, ranks: int, ranks_per_node: int) -> "Layout":
        """Of a group of consecutive ranks: where groups and nodes do not line up, in the parts of nodes that do."""
        return cls(ranks, math.gcd(ranks, ranks_per_node))

    @property
    def nodes(self) -> int:
        """Nodes, or the parts of nodes that line up with groups."""
        return self.ranks // self.per_node


@dataclass(frozen=True)
class Link:
    """One level of a network, as a rank's collectives find it: µs of a step, and the bytes/s that a rank sends while
    all send."""

    step_us: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.step_us < 0 or self.bytes_per_s <= 0:
            raise ValueError(f"{self}: step_us must not be below 0, bytes_per_s must be above 0")


@dataclass(frozen=True)
class Network:
    """What communication costs.

    call_us: of any collective, before its first step. peer_us: that each further peer adds to an all-to-all.
    host_us: of the host's waiting for the device where an all-to-all has to know its numbers of rows.
    source: where the figures are from.
    copy_bytes_per_s: read plus written, where a rank packs, unpacks or casts rows. pass_us: of such a pass, before it
    moves a byte.
    """

    call_us: float
    peer_us: float
    host_us: float
    node: Link
    fabric: Link
    source: str
    copy_bytes_per_s: float = 3.5e12
    pass_us: float = 3.0

    def __post_init__(self) -> None:
        if min(self.call_us, self.peer_us, self.host_us, self.pass_us) < 0 or self.copy_bytes_per_s <= 0:
            raise ValueError(f"{self}: times must not be below 0, copy_bytes_per_s must be above 0")

    def pass_over(self, size: float) -> float:
        """µs of a pass that reads and writes `size` bytes together."""
        return self.pass_us + size / self.copy_bytes_per_s * 1e6


@dataclass(frozen=True)
class Device:
    """What a rank's device reaches: bytes/s that it reads weights at, FLOP/s of its matmuls."""

    bytes_per_s: float
    flop_per_s: float


SLINGSHOT = Network(
    call_us=20,
    peer_us=1,
    host_us=800,
    node=Link(step_us=4, bytes_per_s=200e9),
    fabric=Link(step_us=32, bytes_per_s=20.3e9),
    source="beverin: fitted to all-reduces of 14 KB to 59 MB on 2 nodes that xkernels published; host_us of an H200's "
    "host; the rest assumed",
)
"""4 MI300A a node with a 200 Gb/s NIC each. See docs/communication.md for the fit and what is assumed."""

MI300A = Device(bytes_per_s=3.5e12, flop_per_s=4e14)
"""Rates that others have published; not measured here."""

H100 = Device(bytes_per_s=2.95e12, flop_per_s=7.5e14)
"""What an H100 reached: docs/kernels.md."""


def device_of(arch: str) -> Device:
    """Of an arch as cluster files name it; where nothing is known of it, the MI300A."""
    return H100 if arch == "sm90" else MI300A
