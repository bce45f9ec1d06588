"""An emulated gfx942 (CDNA3, wave64): Triton kernels are compiled for the chip and their machine code is executed.

    assembly   the text that Triton's compiler emits → instructions, labels, resources
    waves      the registers of a batch of waves that run in lockstep
    memory     device memory: the buffers of a launch, and nothing else
    lds        a workgroup's shared memory, which watches for races and for reads of what was never written
    operands   operand text → readers of registers and constants
    scalar, vector, packed, matrix, shared, global_memory: the instructions, by family
    machine    a program on a grid: lockstep, divergence, barriers, faults
    driver     the Triton device
    compiled   what the compiler made: registers, LDS, occupancy, instruction kinds
    cost       counted instructions, and the bounds that they set

What it cannot tell: time, s_waitcnt and hazards, bank conflicts, caches, and whether two waves without a barrier
between them happen to meet. It executes each wave in order, s_waitcnt and s_nop do nothing.
"""
