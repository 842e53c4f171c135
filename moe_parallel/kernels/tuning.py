"""Block sizes: the only place that knows them. All of these kernels are bound by memory."""

SWIGLU_ROWS, SWIGLU_COLUMNS = 4, 1024  # of a program; 1024 divides MiniMax-01's 9216
SWIGLU_WARPS = 8
SLOTS_COLUMNS = 2048  # of a token that a program takes at a time; divides MiniMax-01's 6144
SLOTS_WARPS = 4


def power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (max(n, 1) - 1).bit_length()
