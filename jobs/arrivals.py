"""How far each rank's loading has come, told through the job's store: ranks wait for one that is slow, and not for one
that stands still."""

import json
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

_POLL_S = 0.2


class Arrivals:
    """One rank's view. Every rank must make one before any waits; `wait` returns when all have told their end."""

    def __init__(self, store: "TCPStore", rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._keys = [f"loading/{r}" for r in range(world)]
        self.tell(0)

    def tell(self, done: int, *, ended: bool = False) -> None:
        """This rank has `done` bytes, and with `ended` all of them."""
        self._store.set(self._keys[self._rank], json.dumps([done, ended]))

    def wait(self, stall_s: float) -> None:
        """Until every rank has ended; as long as bytes arrive anywhere, for however long that takes.

        Raises
        ------
        TimeoutError
            If for `stall_s` seconds none of the ranks that are missing has got a byte; names them.
        """
        before, moved = "", time.monotonic()
        while True:
            # One round trip, whatever the number of ranks.
            told = [json.loads(text) for text in self._store.multi_get(self._keys)]
            missing = {rank: done for rank, (done, ended) in enumerate(told) if not ended}
            if not missing:
                return
            now = time.monotonic()
            if str(missing) != before:
                before, moved = str(missing), now
            if now - moved > stall_s:
                who = ", ".join(f"{rank} (at {done} bytes)" for rank, done in missing.items())
                raise TimeoutError(f"for {stall_s:.0f} s no byte has arrived at rank {who}; see their logs and storage")
            time.sleep(_POLL_S)
