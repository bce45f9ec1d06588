"""What a program may do wrong. Every fault ends the launch and names the place."""


class Fault(Exception):
    """Something that a program must not do. `wave` is the batch's wave that did it, where one did."""

    def __init__(self, message: str, wave: int | None = None) -> None:
        super().__init__(message)
        self.wave = wave


class UnknownOpcode(Fault):
    """An instruction, operand or modifier that the emulator does not implement. It is not guessed at."""


class OutOfBounds(Fault):
    """An access to memory that belongs to no buffer, or to LDS, scratch or registers past their end."""


class ReadOnly(Fault):
    """A store to a buffer that the launch may only read."""


class UninitialisedLds(Fault):
    """A read of LDS that no wave of the workgroup has written."""


class LdsRace(Fault):
    """Two waves touched the same LDS byte, one of them writing, with no barrier between."""


class SharedMemoryRace(Fault):
    """A workgroup touched device memory that another one stored in the same launch."""


class DivergentBarrier(Fault):
    """The waves of a workgroup met at different barriers, or some ended while others wait at one."""


class Runaway(Fault):
    """More instructions than a launch may take: a loop that does not end."""
