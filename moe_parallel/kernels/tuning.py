"""Block sizes: the only place that knows them. All of these kernels are bound by memory."""

SWIGLU_ROWS, SWIGLU_COLUMNS = 4, 1024  # of a program; 1024 divides MiniMax-01's 9216
SWIGLU_WARPS = 8
SLOTS_COLUMNS = 2048  # of a token that a program takes at a time; divides MiniMax-01's 6144
SLOTS_WARPS = 4
SPLIT_BLOCK = 1024  # numbers of a program
ROUTER_TILE = 2048  # (token, expert) pairs that a program of the router takes at a time
ROUTER_WARPS = 4
# Most programs of the router, two a multiprocessor: the scan over their counts is one tile.
ROUTER_PROGRAMS = 256
SCAN_COLUMNS = 4  # experts of a program of that scan
POSITIONS_TILE = 2048  # pairs of experts that are compared at a time


def router_tokens(num_experts: int) -> int:
    """Tokens that a program of the router takes at a time."""
    return max(1, ROUTER_TILE // power_of_2(num_experts))


def router_span(num_tokens: int, num_experts: int) -> int:
    """Tokens of a program, a multiple of :func:`router_tokens`, so that programs are few."""
    chunk = router_tokens(num_experts)
    return chunk * max(1, -(-num_tokens // (chunk * ROUTER_PROGRAMS)))


def power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (max(n, 1) - 1).bit_length()
