"""The jobs of the warps of ``lasp.lightning.triton.hopper_scan_kernel``.

Each job walks the chunks of a segment and waits only for what it needs, by barriers in shared
memory: ``full`` and ``empty`` for the stages, ``ready`` and ``free`` for the scores. A wait names
the parity of a phase of a barrier and passes when that phase is over; the one before the first is.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasp.lightning.triton.hopper_chunk_kernel import (
    CHUNK,
    LEFT,
    PRODUCT,
    async_load,
    barrier,
    clear_tiles,
    edge_weights,
    entering_state,
    leave_state,
    store_rows,
    weigh_scores,
)

COLUMN_BYTES = gl.constexpr(2 * 64)  # one column of a chunk: 64 tokens in bfloat16


class DescribedTensors(NamedTuple):
    """What a program reads and writes: tensor descriptors, and the pointer of the output."""

    query: Any
    key: Any
    value: Any
    output: Any
    output_tiles: Any


class Shared(NamedTuple):
    """Shared memory of a program, and its barriers.

    Attributes:
        operands: queries, then keys of a stage, in pieces ``[1, 64, WIDTH]``.
        columns: of values ``[1, 64, 64]`` for each stage and group.
        scores: ``[64, 64]``, two that the groups read in turn, or one of each group.
        results: ``[1, 64, 64]`` for each group.
        powers: weights of scores ``[64, 64]``.
        entering: of the state on entry ``[64]``.
        leaving: of keys on leaving ``[64]``.
        full: the tiles of a stage are there.
        empty: the tiles of a stage were read.
        ready: scores are there; where each group has its own, the last keys are cleared.
        free: scores were read.
    """

    operands: Any
    columns: Any
    scores: Any
    results: Any
    powers: Any
    entering: Any
    leaving: Any
    full: Any
    empty: Any
    ready: Any
    free: Any


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        D: key rows.
        E: columns of the output.
        STEP: 1 forward, -1 in reverse.
        STAGES: number of chunks in shared memory.
        WIDTH: columns of a piece of query and key.
        SHARED: documents start inside segments.
        PIECES: of query and key.
        APART: a group of its own computes the scores.
    """

    D: Any
    E: Any
    STEP: Any
    STAGES: Any
    WIDTH: Any
    SHARED: Any
    PIECES: Any
    APART: Any


@gluon.jit
def _next(place, phase, COUNT: gl.constexpr):
    """The place after this one in a ring, and the parity of its phase."""
    last = place == COUNT - 1
    return gl.where(last, 0, place + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load_chunks(shared, tensors, edges, segment, sizes: gl.constexpr):
    """The job of the loading warp."""
    PIECES: gl.constexpr = sizes.PIECES
    WIDTH: gl.constexpr = sizes.WIDTH
    stage, phase = 0, 0
    for begin in range(0, segment.length, CHUNK):
        mbarrier.wait(shared.empty.index(stage), phase ^ 1)
        full = shared.full.index(stage)
        mbarrier.expect(full, (2 * PIECES * WIDTH + 128) * COLUMN_BYTES)
        token = segment.first + sizes.STEP * begin - (0 if sizes.STEP > 0 else CHUNK - 1)
        for piece in gl.static_range(PIECES):
            at = [segment.head, token, piece * WIDTH]
            place = stage * 2 * PIECES + piece
            async_load(tensors.key, at, full, shared.operands.index(place + PIECES))
            async_load(tensors.query, at, full, shared.operands.index(place))
        for group in gl.static_range(2):
            at = [segment.head, token, segment.block * 128 + group * 64]
            async_load(tensors.value, at, full, shared.columns.index(stage * 2 + group))
        stage, phase = _next(stage, phase, sizes.STAGES)


@gluon.jit
def _scores(operands, stage, sizes: gl.constexpr):
    """The scores ``[keys, queries]`` of a chunk."""
    PIECES: gl.constexpr = sizes.PIECES
    WIDTH: gl.constexpr = sizes.WIDTH
    scores = gl.zeros([64, 64], gl.float32, PRODUCT)
    for piece in gl.static_range(PIECES):
        place = stage * 2 * PIECES + piece
        q = operands.index(place).reshape([64, WIDTH]).permute((1, 0))
        k = operands.index(place + PIECES).reshape([64, WIDTH])
        scores = warpgroup_mma(k, q, scores, use_acc=piece > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def compute_scores(shared, tensors, edges, segment, sizes: gl.constexpr):
    """The job of the group of scores."""
    STEP: gl.constexpr = sizes.STEP
    stage, phase, turn, seen = 0, 0, 0, 0
    for begin in range(0, segment.length, CHUNK):
        n = gl.minimum(segment.length - begin, CHUNK)
        token = segment.first + STEP * begin
        border = n < 0  # never: no document begins inside a chunk
        if sizes.SHARED:
            border = gl.load(segment.reach + token + STEP * (n - 1)) < n
        mbarrier.wait(shared.full.index(stage), phase)
        _clear_keys(0, shared, stage, n, sizes)
        scores = _scores(shared.operands, stage, sizes)
        scores = weigh_scores(scores, shared.powers, segment, token, n, border, STEP)
        mbarrier.wait(shared.free.index(turn), seen ^ 1)
        shared.scores.index(turn).store(scores)
        fence_async_shared()
        barrier()
        mbarrier.arrive(shared.ready.index(turn))
        mbarrier.arrive(shared.empty.index(stage))
        stage, phase = _next(stage, phase, sizes.STAGES)
        turn, seen = _next(turn, seen, 2)


@gluon.jit
def compute_columns(group: gl.constexpr, shared, tensors, edges, segment, sizes: gl.constexpr):
    """The job of a group of columns: 64 of the output, if there are so many."""
    column = segment.block * 128 + group * 64
    if sizes.E % 128 == 0 or column < sizes.E:
        _walk(group, column, shared, tensors, edges, segment, sizes)
    else:
        _read_nothing(shared, segment, sizes)


@gluon.jit
def _read_nothing(shared, segment, sizes: gl.constexpr):
    """What a group without columns does, so that others do not wait for it."""
    stage, phase, turn, seen = 0, 0, 0, 0
    for _ in range(0, segment.length, CHUNK):
        mbarrier.wait(shared.full.index(stage), phase)
        if sizes.APART:
            mbarrier.wait(shared.ready.index(turn), seen)
            mbarrier.arrive(shared.free.index(turn))
        mbarrier.arrive(shared.empty.index(stage))
        stage, phase = _next(stage, phase, sizes.STAGES)
        turn, seen = _next(turn, seen, 2)


@gluon.jit
def _walk(group: gl.constexpr, column, shared, tensors, edges, segment, sizes: gl.constexpr):
    """The chunks of a segment: output and state of the columns of a group."""
    PIECES: gl.constexpr = sizes.PIECES
    STEP: gl.constexpr = sizes.STEP
    state = entering_state(edges, segment, column, sizes.D, sizes.E, sizes.WIDTH)
    stage, phase, turn, seen = 0, 0, 0, 0
    reach = segment.reach + segment.first
    reach_last = CHUNK
    if sizes.SHARED:
        reach_last = gl.load(reach + STEP * (gl.minimum(segment.length, CHUNK) - 1))
    for begin in range(0, segment.length, CHUNK):
        n = gl.minimum(segment.length - begin, CHUNK)
        token = segment.first + STEP * begin
        border = n < 0  # never: no document begins inside a chunk
        if sizes.SHARED:
            border = reach_last < n
        mbarrier.wait(shared.full.index(stage), phase)
        value_tile = shared.columns.index(stage * 2 + group).reshape([64, 64])
        clear_tiles(shared.columns, stage * 2 + group, 1, n, 64, STEP)
        scores_tile = shared.scores.index(turn if sizes.APART else group)
        if not sizes.APART:
            _clear_keys(group, shared, stage, n, sizes)
            scores = _scores(shared.operands, stage, sizes)
            scores = weigh_scores(scores, shared.powers, segment, token, n, border, STEP)
            scores_tile.store(scores)
            fence_async_shared()
        result = _of_state(state, shared.operands, stage, sizes)
        reach_next = reach_last
        if sizes.SHARED:
            reach_next = gl.load(reach + STEP * (gl.minimum(begin + 2 * CHUNK, segment.length) - 1))
        leaving, entering, across = edge_weights(
            shared.leaving, shared.entering, segment, token, n, reach_last, border, STEP
        )
        if sizes.APART:
            mbarrier.wait(shared.ready.index(turn), seen)
        result, state = _add_chunk(
            result, state, shared.operands, stage, value_tile, scores_tile, leaving, entering,
            across, sizes,
        )  # fmt: skip
        store_rows(
            result, shared.results.index(group), tensors.output, tensors.output_tiles, segment,
            token, n, column, sizes.E, STEP,
        )  # fmt: skip
        done = ()
        for piece in gl.static_range(PIECES):
            done += (warpgroup_mma_wait(0, deps=(state[piece],)),)
        state = done
        tma.store_wait(0)
        barrier()  # all warps are done with the chunk, and the result was read
        if sizes.APART:
            mbarrier.arrive(shared.free.index(turn))
        mbarrier.arrive(shared.empty.index(stage))
        reach_last = reach_next
        stage, phase = _next(stage, phase, sizes.STAGES)
        turn, seen = _next(turn, seen, 2)
    if edges.final is not None:
        leave_state(state, edges, segment, column, sizes.D, sizes.E, sizes.WIDTH)


@gluon.jit
def _clear_keys(group: gl.constexpr, shared, stage, n, sizes: gl.constexpr):
    """Zero what the keys of a last chunk have of others: once for both groups of columns."""
    PIECES: gl.constexpr = sizes.PIECES
    if n < CHUNK:
        if group > 0:
            mbarrier.wait(shared.ready.index(0), 0)
            return
        clear_tiles(shared.operands, (2 * stage + 1) * PIECES, PIECES, n, sizes.WIDTH, sizes.STEP)
        if not sizes.APART:
            mbarrier.arrive(shared.ready.index(0))


@gluon.jit
def _of_state(state, operands, stage, sizes: gl.constexpr):
    """Start what the state on entry gives to the output ``[columns, queries]``."""
    PIECES: gl.constexpr = sizes.PIECES
    WIDTH: gl.constexpr = sizes.WIDTH
    result = gl.zeros([64, 64], gl.float32, PRODUCT)
    for piece in gl.static_range(PIECES):
        q = operands.index(stage * 2 * PIECES + piece)
        left = gl.convert_layout(state[piece].to(gl.bfloat16), LEFT)
        q = q.reshape([64, WIDTH]).permute((1, 0))
        result = warpgroup_mma(left, q, result, use_acc=piece > 0, is_async=True)
        if sizes.D > 128:  # registers of one rounded piece at a time
            result = warpgroup_mma_wait(0, deps=(result,))
    return result


@gluon.jit
def _add_chunk(
    result, state, operands, stage, value_tile, scores_tile, leaving, entering, across,
    sizes: gl.constexpr,
):  # fmt: skip
    """The output of a chunk, and the state after it, whose products are still under way."""
    PIECES: gl.constexpr = sizes.PIECES
    v = value_tile.permute((1, 0))
    weighted = (v.load(LEFT).to(gl.float32) * leaving[None, :]).to(gl.bfloat16)
    kept = ()
    for piece in gl.static_range(PIECES):
        kept += (state[piece] * across,)
    result = warpgroup_mma_wait(0, deps=(result,)) * entering[None, :]
    result = warpgroup_mma(v, scores_tile, result, is_async=True)
    after = ()
    for piece in gl.static_range(PIECES):
        k = operands.index((2 * stage + 1) * PIECES + piece).reshape([64, sizes.WIDTH])
        after += (warpgroup_mma(weighted, k, kept[piece], is_async=True),)
    return warpgroup_mma_wait(PIECES, deps=(result,)), after
