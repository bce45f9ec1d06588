"""A token on its way to other ranks: one row of bytes with its hidden state, expert ids and routing weights."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_ep.fp8 import dequantise_rows, quantise_rows
from moe_ep.shape import FP8_BLOCK
from moe_ep.spec import TopKOutput

Payload = Literal["bf16", "fp8"]
"""Of the hidden state: bf16 as it is, or e4m3 with a power-of-two scale for each 128 (V4's own activations)."""

_ROUTE_BYTES = 8  # an int32 id and an f32 weight


@dataclass(frozen=True)
class RowFormat:
    """What a row holds: `hidden` features in `payload`, then `top_k` ids, then their weights."""

    hidden: int
    top_k: int
    payload: Payload

    @property
    def state_bytes(self) -> int:
        """Of the hidden state, as V4's sizes need no padding: 2·H, or H + H/128."""
        return 2 * self.hidden if self.payload == "bf16" else self.hidden + self._scales

    @property
    def row_bytes(self) -> int:
        """Of the whole row."""
        return self.ids_at + _ROUTE_BYTES * self.top_k

    @property
    def _scales(self) -> int:
        return -(-self.hidden // FP8_BLOCK)

    @property
    def _padding(self) -> int:
        return -self.state_bytes % 4

    @property
    def ids_at(self) -> int:
        """The byte at which the ids begin, a multiple of 4."""
        return self.state_bytes + self._padding

    def pack(self, x: Tensor, topk: TopKOutput) -> Tensor:
        """uint8 [M, row_bytes] of x bf16 [M, H], ids int [M, k] and weights [M, k]."""
        rows = torch.empty(x.shape[0], self.row_bytes // 4, dtype=torch.int32, device=x.device)
        if x.is_cuda and x.dtype == torch.bfloat16:
            from moe_ep import passes  # Triton is imported only where there is a GPU

            given = (x.contiguous(), topk.topk_ids.contiguous(), topk.topk_weights.float().contiguous())
            if passes.takes(*given):
                passes.pack(*given, rows.view(torch.uint8), self.ids_at, fp8=self.payload == "fp8")
                return rows.view(torch.uint8)
        if self.payload == "bf16":
            rows[:, : self.ids_at // 4] = _words(x)
        else:
            codes, scales = quantise_rows(x)
            state = torch.nn.functional.pad(torch.cat((codes.view(torch.uint8), scales), 1), (0, self._padding))
            rows[:, : self.ids_at // 4] = _words(state)
        ids, weights = self.ids_at // 4, self.ids_at // 4 + self.top_k
        rows[:, ids:weights] = topk.topk_ids
        rows[:, weights:] = _words(topk.topk_weights.float())
        return rows.view(torch.uint8)

    def unpack(self, rows: Tensor) -> tuple[Tensor, TopKOutput]:
        """x bf16 [M, H] and the routes of rows uint8 [M, row_bytes]."""
        if rows.is_cuda:
            from moe_ep import passes

            if passes.takes(rows):
                count, k = rows.shape[0], self.top_k
                x = rows.new_empty(count, self.hidden, dtype=torch.bfloat16)
                ids, values = rows.new_empty(count, k, dtype=torch.int32), rows.new_empty(count, k, dtype=torch.float32)
                passes.unpack(rows, x, ids, values, self.ids_at, fp8=self.payload == "fp8")
                return x, TopKOutput(values, ids, None)
        weights = _part(rows, self.ids_at + 4 * self.top_k, self.row_bytes).view(torch.float32)
        state = _part(rows, 0, self.ids_at)
        if self.payload == "bf16":
            return state.view(torch.bfloat16), TopKOutput(weights, self.ids(rows), None)
        raw = state.view(torch.uint8)
        codes = raw[:, : self.hidden].view(torch.float8_e4m3fn)
        x = dequantise_rows(codes, raw[:, self.hidden : self.state_bytes]).bfloat16()
        return x, TopKOutput(weights, self.ids(rows), None)

    def ids(self, rows: Tensor) -> Tensor:
        """int32 [M, k] of rows."""
        return _part(rows, self.ids_at, self.ids_at + 4 * self.top_k)

    def nobody(self, rows: Tensor) -> None:
        """Make these rows padding: tokens without routes."""
        rows[:, self.ids_at : self.ids_at + 4 * self.top_k] = 255  # −1


def _words(x: Tensor) -> Tensor:
    """int32 [M, bytes/4]: what is copied in words takes a quarter of the time of bytes."""
    return x.contiguous().view(torch.int32)


def _part(rows: Tensor, begin: int, end: int) -> Tensor:
    """int32 [M, (end − begin)/4], contiguous, of uint8 rows."""
    return rows.view(torch.int32)[:, begin // 4 : end // 4].contiguous()
