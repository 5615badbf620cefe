"""Triton implementation of `reselect` for CUDA and ROCm: three launches for all layers, however many they are.

`choose_kernel` ranks by counting: a row is chosen where fewer others are better than core has room for. `pair_kernel`
lists the rows that leave and those that enter, `swap_kernel` says of each pair where its rows go and swaps the tokens.
They are kernels of their own because each needs what all programs of the one before have written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_MINE, BLOCK_OTHERS, BLOCK_PAIRED, BLOCK_SWAPPED = 16, 128, 1024, 128
SIZES = ("batch", "groups", "keys", "visual", "width", "most")
"""Change from prompt to prompt, some at every step, and no address is aligned by them: one compilation serves all."""


@triton.jit
def _scored(scores, slots, tokens, j, count):
    """Scores and tokens of the rows ``j``. NaN counts as the best, as it does in a sort."""
    there = j < count
    slot = tl.load(slots + j, mask=there, other=0)
    score = tl.load(scores + slot, mask=there, other=float("-inf"))
    token = tl.load(tokens + j, mask=there, other=0).to(tl.int32)  # fewer registers
    return tl.where(score != score, float("inf"), score), token


@triton.jit(do_not_specialize=SIZES[:5])
def choose_kernel(
    scores,
    slots,
    tokens,
    core,
    secondary,
    chosen,
    batch,
    groups,
    keys,
    visual,
    width,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes for some slots of one layer, batch row and group whether what lies there is among the best."""
    row = tl.program_id(0).to(tl.int64)
    b = (row // groups) % batch
    scores, slots, tokens = scores + row * keys, slots + b * visual, tokens + row * visual
    kept, count = tl.load(core + b), tl.load(secondary + b)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    score, token = _scored(scores, slots, tokens, j, count)
    better = tl.zeros((BLOCK_J,), tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        other, its_token = _scored(scores, slots, tokens, k, count)
        above = other[None, :] > score[:, None]
        earlier = (other[None, :] == score[:, None]) & (its_token[None, :] < token[:, None])
        better += tl.sum(((k < count)[None, :] & (above | earlier)).to(tl.int32), 1)
    tl.store(chosen + row * width + j, ((better < kept) & (j < count)).to(tl.uint8), mask=j < width)


@triton.jit(do_not_specialize=(*SIZES[:2], *SIZES[4:]))
def pair_kernel(chosen, core, leaving, entering, pairs, batch, groups, width, most, BLOCK: tl.constexpr):
    """Lists the slots whose rows leave core and those whose rows enter, in order, and counts them."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(core + (row // groups) % batch)
    left, entered = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        wanted, inside = tl.load(chosen + row * width + j, mask=j < width, other=0) != 0, j < kept
        leaves, enters = ((inside & (wanted == 0)) & (j < width)).to(tl.int32), (wanted & (inside == 0)).to(tl.int32)
        tl.store(leaving + row * most + left + tl.cumsum(leaves, 0) - 1, j, mask=leaves != 0)
        tl.store(entering + row * most + entered + tl.cumsum(enters, 0) - 1, j, mask=enters != 0)
        left += tl.sum(leaves, 0)
        entered += tl.sum(enters, 0)
    tl.store(pairs + row, left)


@triton.jit(do_not_specialize=(*SIZES[:2], "visual", "most"))
def swap_kernel(
    slots,
    tokens,
    leaving,
    entering,
    pairs,
    source,
    target,
    batch,
    groups,
    visual,
    most,
    BLOCK: tl.constexpr,
):
    """Writes where the rows of some pairs go, ``-1`` beyond the last pair, and swaps their tokens."""
    row = tl.program_id(0).to(tl.int64)
    slots, tokens = slots + ((row // groups) % batch) * visual, tokens + row * visual
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, inside = n < tl.load(pairs + row), n < most
    here = tl.load(leaving + row * most + n, mask=real, other=0)
    there = tl.load(entering + row * most + n, mask=real, other=0)
    leaves, enters = tl.load(tokens + here, mask=real, other=0), tl.load(tokens + there, mask=real, other=0)
    tl.store(tokens + here, enters, mask=real)
    tl.store(tokens + there, leaves, mask=real)
    old, new = tl.load(slots + here, mask=real, other=0), tl.load(slots + there, mask=real, other=0)
    first = row * 2 * most + n
    tl.store(source + first, new, mask=inside)
    tl.store(source + first + most, old, mask=inside)
    tl.store(target + first, tl.where(real, old, -1), mask=inside)
    tl.store(target + first + most, tl.where(real, new, -1), mask=inside)


def reselect_triton(
    scores: Tensor, slots: Tensor, tokens: Tensor, core: Tensor, secondary: Tensor, width: int, most: int
) -> tuple[Tensor, Tensor]:
    """`reselect` on CUDA and ROCm; see there for shapes."""
    layers, batch, groups, visual = tokens.shape
    rows, device, slots = layers * batch * groups, tokens.device, slots.contiguous()
    chosen = torch.empty(rows, width, dtype=torch.uint8, device=device)
    leaving, entering = (torch.empty(rows, most, dtype=torch.int32, device=device) for _ in range(2))
    pairs = torch.empty(rows, dtype=torch.int32, device=device)
    source, target = (torch.empty(layers, batch, groups, 2 * most, dtype=torch.int64, device=device) for _ in range(2))
    sizes = (batch, groups, scores.shape[-1], visual, width)
    choose_kernel[(rows, triton.cdiv(width, BLOCK_MINE))](
        scores, slots, tokens, core, secondary, chosen, *sizes, BLOCK_J=BLOCK_MINE, BLOCK_K=BLOCK_OTHERS
    )
    pair_kernel[(rows,)](chosen, core, leaving, entering, pairs, batch, groups, width, most, BLOCK=BLOCK_PAIRED)
    swap_kernel[(rows, triton.cdiv(most, BLOCK_SWAPPED))](
        slots, tokens, leaving, entering, pairs, source, target, batch, groups, visual, most, BLOCK=BLOCK_SWAPPED
    )
    return source, target
