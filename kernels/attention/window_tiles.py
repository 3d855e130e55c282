"""Pieces of the kernels of attention inside (shifted) windows: a program takes one head of several windows.

Shift, partition, biases, seams and padding are addresses. Logits are exponents of two.

The keys' bias changes all logits of a query alike, and so no weight. The values' bias is added to the result, since
weights sum to one, and changes no logit's gradient. So kernels only read the queries' bias, and the forward kernel the
values' one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2E, Rows, finite_or_zero, load_rows, pairs, table_index

APART = tl.constexpr(-100 * 1.4426950408889634)  # Swin adds -100 across a seam


class Window(NamedTuple):
    """A window as kernels know it when they are compiled, as ``WINDOW``."""

    H: int
    W: int
    PAD_FIRST: bool
    SEAM: bool  # True if any window has a seam


class Grid(NamedTuple):
    """The windows of a map as kernels get them when they run.

    Windows of four kinds are counted separately: those without a seam, in the last row, in the last column, in both.
    """

    steps: Any  # windows of a program
    heads: Any
    N: Any
    down: Any  # windows of an image along H and W
    across: Any
    inner_h: Any  # windows without a seam along H and W
    inner_w: Any
    start_1: Any  # the first group of programs of the second, third and fourth kind
    start_2: Any
    start_3: Any
    shift_h: Any
    shift_w: Any
    H: Any
    W: Any
    cycle_h: Any  # where positions begin again
    cycle_w: Any
    roll_h: Any
    roll_w: Any


class Run(NamedTuple):
    """One program's work: a head and the windows [first, last), all of one kind, with that kind's geometry."""

    grid: Grid
    head: Any
    first: Any
    last: Any
    rows: Any  # windows of this kind along H and W
    columns: Any
    row: Any  # the first of them
    column: Any
    seam_h: Any  # where the seams are in a window
    seam_w: Any


class Corner(NamedTuple):
    """A window of a run: the tokens of the images before its own (int64), and its first position along H and W."""

    run: Run
    n: Any
    h: Any
    w: Any


@triton.jit
def this_run(grid, WINDOW: tl.constexpr):
    """Returns this program's run."""
    group = tl.program_id(0) // grid.heads
    kind = tl.where(group < grid.start_1, 0, tl.where(group < grid.start_2, 1, tl.where(group < grid.start_3, 2, 3)))
    start = tl.where(kind == 2, grid.start_2, grid.start_3)
    start = tl.where(kind == 0, 0, tl.where(kind == 1, grid.start_1, start))
    last_h = (kind == 1) | (kind == 3)
    last_w = kind >= 2
    rows = tl.where(last_h, 1, grid.inner_h)
    columns = tl.where(last_w, 1, grid.inner_w)
    row = tl.where(last_h, grid.down - 1, 0)
    column = tl.where(last_w, grid.across - 1, 0)
    seam_h = tl.where(last_h, WINDOW.H - grid.shift_h, WINDOW.H)
    seam_w = tl.where(last_w, WINDOW.W - grid.shift_w, WINDOW.W)
    first = (group - start) * grid.steps
    last = tl.minimum(first + grid.steps, grid.N * rows * columns)
    return Run(grid, tl.program_id(0) % grid.heads, first, last, rows, columns, row, column, seam_h, seam_w)


@triton.jit
def corner(window, run, WINDOW: tl.constexpr):
    """Returns the corner of a window of the run."""
    at = window % (run.rows * run.columns)
    n = (window // (run.rows * run.columns)).to(tl.int64) * run.grid.H * run.grid.W
    return Corner(run, n, (run.row + at // run.columns) * WINDOW.H, (run.column + at % run.columns) * WINDOW.W)


@triton.jit
def _source(p, size, cycle, roll, PAD_FIRST: tl.constexpr):
    """Returns the row or column at position p, and whether it exists."""
    at = p + roll
    at -= tl.where(at >= cycle, cycle, 0)
    return at, (at if PAD_FIRST else p) < size


@triton.jit
def places(i, at, WINDOW: tl.constexpr):
    """Returns the tokens, counted from the image's first, at places i of the window, and whether they exist."""
    grid = at.run.grid
    h, exists_h = _source(at.h + i // WINDOW.W, grid.H, grid.cycle_h, grid.roll_h, WINDOW.PAD_FIRST)
    w, exists_w = _source(at.w + i % WINDOW.W, grid.W, grid.cycle_w, grid.roll_w, WINDOW.PAD_FIRST)
    return h.to(tl.int64) * grid.W + w, (i < WINDOW.H * WINDOW.W) & exists_h & exists_w


@triton.jit
def part_rows(ptr, token, exists, at, HEAD: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1):
    """Returns the rows of tokens in a map of PARTS side by side, as queries, keys and values are."""
    C = at.run.grid.heads * HEAD.D
    return Rows(ptr + at.run.head * HEAD.D + at.n * PARTS * C + PART * C, token, exists, PARTS * C)


@triton.jit
def load_part(ptr, token, exists, at, HEAD: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1):
    """Returns `part_rows` and their values, [places, BLOCK_D]."""
    rows = part_rows(ptr, token, exists, at, HEAD, PART, PARTS)
    return rows, load_rows(rows, HEAD)


@triton.jit
def load_bias(bias_ptr, run, HEAD: tl.constexpr, PART: tl.constexpr = 0):
    """Returns the bias of queries or of values, [BLOCK_D], or None."""
    bias = None
    if bias_ptr is not None:
        d = tl.arange(0, HEAD.BLOCK_D)
        at = (PART * run.grid.heads + run.head) * HEAD.D
        bias = tl.load(bias_ptr + at + d, mask=d < HEAD.D, other=0.0).to(HEAD.ACC)
    return bias


@triton.jit
def _side(i, run, WINDOW: tl.constexpr):
    """Returns a number for each of the four parts that seams cut a window into."""
    return (i // WINDOW.W >= run.seam_h).to(tl.int32) * 2 + (i % WINDOW.W >= run.seam_w).to(tl.int32)


@triton.jit
def positions(table_ptr, i, j, run, WINDOW: tl.constexpr):
    """Returns the bias of queries i and keys j, which are [queries, 1] and [1, keys] or the other way round.

    It is 100 less if a seam lies between them, and -inf if there is no key.
    """
    TOKENS: tl.constexpr = WINDOW.H * WINDOW.W
    COLUMNS: tl.constexpr = 2 * WINDOW.W - 1
    table_ptr += run.head * (2 * WINDOW.H - 1) * COLUMNS
    offset = table_index(i, WINDOW.W, COLUMNS) + (WINDOW.H - 1) * COLUMNS + WINDOW.W - 1
    offset -= table_index(j, WINDOW.W, COLUMNS)
    bias = tl.load(table_ptr + offset, mask=(i < TOKENS) & (j < TOKENS), other=0.0)
    if WINDOW.SEAM:
        bias += tl.where(_side(i, run, WINDOW) != _side(j, run, WINDOW), APART, 0.0)
    return tl.where(j < TOKENS, bias, -float("inf"))


@triton.jit
def bias_logits(k, bias_q, HEAD: tl.constexpr):
    """Returns what the queries' bias [BLOCK_D] adds to all logits of a key: [keys], or None."""
    found = None
    if bias_q is not None:
        found = tl.sum(k.to(HEAD.ACC) * bias_q[None, :], 1) * (HEAD.SCALE * LOG2E)
    return found


@triton.jit
def logits(products, added, bias, HEAD: tl.constexpr, ALONG: tl.constexpr = 0):
    """Returns the logits from products of queries and keys; ``added``, from `bias_logits`, is per key.

    Queries are along axis ``ALONG``.
    """
    found = products * (HEAD.SCALE * LOG2E) + bias
    if added is not None:
        found += tl.expand_dims(added, ALONG)
    return found


@triton.jit
def meet_keys(
    start,
    q_rows,
    q,
    i,
    bias_q,
    qkv_ptr,
    table_ptr,
    at,
    HEAD: tl.constexpr,
    WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """Returns STEP keys from start on, the rows of their values, the values, and the logits of queries i."""
    j = start + tl.arange(0, STEP)
    token, exists = places(j, at, WINDOW)
    k_rows, k = load_part(qkv_ptr, token, exists, at, HEAD, 1, 3)
    v_rows, v = load_part(qkv_ptr, token, exists, at, HEAD, 2, 3)
    bias = positions(table_ptr, i[:, None], j[None, :], at.run, WINDOW)
    return k, v_rows, v, logits(pairs(q_rows, q, k_rows, k, HEAD), bias_logits(k, bias_q, HEAD), bias, HEAD)


@triton.jit
def more_keys(s, top):
    """Returns exponentials of logits, the grown maximum, and the factor for the sums so far."""
    new_top = tl.maximum(top, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
    shift = finite_or_zero(new_top)
    return tl.exp2(s - shift[:, None]), new_top, tl.exp2(top - shift)
