"""Chunk scan for Hopper GPUs: warps of a program have jobs of their own.

The output is that of ``lasp.lightning.triton.chunk_scan_kernel``, whose kernels run after this one
to repair what is not finite. In those kernels all warps of a program do the same at the same time:
while they round and weigh, the tensor cores idle, and while these multiply, the warps idle. Here

- one warp loads chunks by the copy engine, as far ahead as there are stages;
- one group of four warps computes the weighted scores, one chunk ahead of the output;
- two groups of four warps compute 64 columns of the output each, and keep the state of these.

With more than 192 key rows the state takes the registers of the group of scores. There each group
of columns computes the scores for itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lasp.lightning.triton import chunk_state_kernel as table_of
from lasp.lightning.triton.hopper_chunk_kernel import (
    CHUNK,
    TOKENS,
    Edges,
    SegmentOfHead,
    entering_of,
    flow_rows,
    leaving_of,
    powers_of,
)
from lasp.lightning.triton.hopper_jobs_kernel import (
    DescribedTensors,
    Shared,
    Sizes,
    compute_columns,
    compute_scores,
    load_chunks,
)

FIRST = gl.constexpr(table_of.FIRST.value)
LENGTH = gl.constexpr(table_of.LENGTH.value)
COLUMNS = gl.constexpr(table_of.COLUMNS.value)
LOG2E = gl.constexpr(table_of.LOG2E.value)
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())
# Tiles ``[1, 64 tokens, columns]`` of the copy engine, and those that groups alone see.
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
MATRIX = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Four rows of a group read eight numbers each at a time, from different banks.
WEIGHTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _scan(tensors, edges, segment, sizes: gl.constexpr):
    """One segment of one head, 128 columns: shared memory, and who does what."""
    STAGES: gl.constexpr = sizes.STAGES
    STEP: gl.constexpr = sizes.STEP
    rate, scale = segment.rate, segment.scale
    TILES: gl.constexpr = STAGES * 2 * sizes.PIECES
    leaving = leaving_of(CHUNK, flow_rows(TOKENS, STEP), rate, scale, STEP)
    shared = Shared(
        gl.allocate_shared_memory(gl.bfloat16, [TILES, 1, 64, sizes.WIDTH], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, 1, 64, 64], TILE),
        gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], MATRIX),
        gl.allocate_shared_memory(gl.bfloat16, [2, 1, 64, 64], TILE),
        gl.allocate_shared_memory(gl.float32, [64, 64], WEIGHTS, powers_of(rate, scale, STEP)),
        gl.allocate_shared_memory(gl.float32, [64], VECTOR, entering_of(rate, scale, STEP)),
        gl.allocate_shared_memory(gl.float32, [64], VECTOR, leaving),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER),
    )
    for stage in gl.static_range(STAGES):
        mbarrier.init(shared.full.index(stage), count=1)
        mbarrier.init(shared.empty.index(stage), count=2 + sizes.APART)
    for turn in gl.static_range(2):
        mbarrier.init(shared.ready.index(turn), count=1)
        mbarrier.init(shared.free.index(turn), count=2)
    if sizes.APART:
        gl.warp_specialize(
            [
                (compute_columns, (0, shared, tensors, edges, segment, sizes)),
                (compute_columns, (1, shared, tensors, edges, segment, sizes)),
                (compute_scores, (shared, tensors, edges, segment, sizes)),
                (load_chunks, (shared, tensors, edges, segment, sizes)),
            ],
            [4, 4, 1],
            [200, 88, 24],
        )
    else:
        gl.warp_specialize(
            [
                (compute_columns, (0, shared, tensors, edges, segment, sizes)),
                (compute_columns, (1, shared, tensors, edges, segment, sizes)),
                (load_chunks, (shared, tensors, edges, segment, sizes)),
            ],
            [4, 1],
            [240, 24],
        )


@gluon.jit
def _segment(row, block, rates, table, reach, num_heads, scale):
    """What the programs of a row, a segment and head, walk."""
    head = row % num_heads
    table += row // num_heads * COLUMNS
    first, length = gl.load(table + FIRST), gl.load(table + LENGTH)
    rate = gl.load(rates + head) * LOG2E
    return SegmentOfHead(head, first, length, block, rate, scale, num_heads, table, reach)


@gluon.jit(do_not_specialize=["num_heads"])
def hopper_scan_kernel(
    query, key, value, output, output_tiles,
    states, initial_state, incoming, final_state, rates, table, reach, num_heads, scale,
    D: gl.constexpr, E: gl.constexpr, STEP: gl.constexpr, TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr, WIDTH: gl.constexpr, APART: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """One program a segment, head and 128 columns.

    Arguments are those of ``chunk_scan_kernel``; query, key, value, output_tiles are descriptors.
    """
    blocks: gl.constexpr = (E + 127) // 128
    program = gl.program_id(0)
    segment = _segment(program // blocks, program % blocks, rates, table, reach, num_heads, scale)
    stride_d: gl.constexpr = 1 if TRANSPOSED else E
    stride_e: gl.constexpr = D if TRANSPOSED else 1
    edges = Edges(states, initial_state, incoming, final_state, stride_d, stride_e, True)
    tensors = DescribedTensors(query, key, value, output, output_tiles)
    pieces: gl.constexpr = (D + WIDTH - 1) // WIDTH
    sizes: gl.constexpr = Sizes(D, E, STEP, STAGES, WIDTH, SHARED, pieces, APART)
    _scan(tensors, edges, segment, sizes)


@gluon.jit(do_not_specialize=["num_heads"])
def hopper_gradients_kernel(
    q, k, v, do, q_columns, do_columns, dk, dv, dk_tiles, dv_tiles,
    states, initial_state, incoming, final_state, rates, table, reach, num_heads, scale,
    D: gl.constexpr,
    STAGES: gl.constexpr, WIDTH: gl.constexpr, APART: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Half of the programs give dk, the others dv; as ``hopper_scan_kernel``.

    Arguments are those of ``key_value_gradients_kernel``; tensors from q to do_columns, dk_tiles
    and dv_tiles are descriptors.
    """
    blocks: gl.constexpr = (D + 127) // 128
    program = gl.program_id(0)
    row, block = program // (blocks * 2), program % (blocks * 2)
    of_dv = block >= blocks
    if of_dv:
        block -= blocks
        query, key, value, output, output_tiles = k, q, do_columns, dv, dv_tiles
        stride_d, stride_e = D, 1
    else:
        query, key, value, output, output_tiles = v, do, q_columns, dk, dk_tiles
        stride_d, stride_e = 1, D
    segment = _segment(row, block, rates, table, reach, num_heads, scale)
    edges = Edges(states, initial_state, incoming, final_state, stride_d, stride_e, of_dv)
    tensors = DescribedTensors(query, key, value, output, output_tiles)
    pieces: gl.constexpr = (D + WIDTH - 1) // WIDTH
    sizes: gl.constexpr = Sizes(D, D, -1, STAGES, WIDTH, SHARED, pieces, APART)
    _scan(tensors, edges, segment, sizes)
