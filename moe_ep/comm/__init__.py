"""How the ranks' partials become the result: strategies behind one interface (`Combine`)."""

from moe_ep.comm.all_to_all import AllToAll
from moe_ep.comm.auto import Auto
from moe_ep.comm.gather import AllGather
from moe_ep.comm.group import CollectiveError, Group, Pending, let_collectives_begin
from moe_ep.comm.reduce import AllReduce, Alone, ReduceScatter
from moe_ep.comm.strategy import Combine, Routed, combine_for
from moe_ep.comm.wire import Payload

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Alone",
    "Auto",
    "CollectiveError",
    "Combine",
    "Group",
    "Payload",
    "Pending",
    "ReduceScatter",
    "Routed",
    "combine_for",
    "let_collectives_begin",
]
