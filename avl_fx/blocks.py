"""Which consecutive layers form a lazy block: pure functions of a matrix of divergences.

Layers count from 0. ``matrix[i][j]`` is how differently layers ``i`` and ``j`` attend (symmetric, at least 0); infinite
where one may not inherit from the other. A block ``(first, last)`` costs the sum of ``matrix[first][layer]`` over its
lazy layers, which are all but the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Block", "cheapest_blocks", "cost_of", "largest_within", "most_weight", "neighbours_under", "weight_of"]

Block = tuple[int, int]
Matrix = Sequence[Sequence[float]]

_SLACK = 1e-12
"""Relative: what the order of a sum may change."""


def neighbours_under(matrix: Matrix, epsilon: float) -> tuple[Block, ...]:
    """Blocks by the rule of the paper (Q Cache, arXiv 2602.01901): a layer joins while it resembles the one before.

    Walks the layers once. A layer whose divergence from the layer *before* it is below ``epsilon`` joins that layer's
    block, unless it may not inherit from the block's first layer.
    """
    blocks: list[Block] = []
    first = 0
    for layer in range(1, len(matrix) + 1):
        if layer < len(matrix) and matrix[layer - 1][layer] < epsilon and math.isfinite(matrix[first][layer]):
            continue
        if layer - 1 > first:
            blocks.append((first, layer - 1))
        first = layer
    return tuple(blocks)


def cheapest_blocks(matrix: Matrix, weights: Sequence[int], least: int) -> tuple[Block, ...] | None:
    """Blocks of the smallest total cost whose lazy layers weigh at least ``least``; ``None`` where there are none.

    Exact, by dynamic programming over where the blocks end. Of equally cheap choices it is one of the smallest weight.

    Args:
        matrix: divergences, see above.
        weights: what each layer is worth when it is lazy, at least 0; all 1 to count layers.
        least: what the lazy layers have to be worth together.
    """
    least = max(least, 0)
    # Without the last lazy layer of a block no choice costs more: the lightest of the cheapest can spare none.
    table = _table(matrix, weights, least + max(weights, default=0))
    return _traced(table, min(range(least, len(table[-1])), key=lambda weight: table[-1][weight][0]))


def largest_within(matrix: Matrix, budget: float) -> tuple[Block, ...]:
    """Blocks with as many lazy layers as a total cost of ``budget`` allows, and of these the cheapest."""
    layers = len(matrix)
    table = _table(matrix, [1] * layers, layers)
    allowed = budget + _SLACK * abs(budget)
    return _traced(table, max(n for n, (cost, *_) in enumerate(table[layers]) if n == 0 or cost <= allowed)) or ()


def most_weight(matrix: Matrix, weights: Sequence[int]) -> int:
    """What lazy layers can be worth together at most."""
    best = [0] * (len(matrix) + 1)
    for end in range(1, len(matrix) + 1):
        best[end] = best[end - 1]
        for first in range(end):
            if all(math.isfinite(matrix[first][layer]) for layer in range(first + 1, end)):
                best[end] = max(best[end], best[first] + sum(weights[first + 1 : end]))
    return best[-1]


def cost_of(matrix: Matrix, blocks: Sequence[Block]) -> float:
    """Sum of the divergences of all lazy layers from their anchors."""
    return math.fsum(matrix[first][layer] for first, last in blocks for layer in range(first + 1, last + 1))


def weight_of(weights: Sequence[int], blocks: Sequence[Block]) -> int:
    """What the lazy layers of ``blocks`` are worth."""
    return sum(weights[layer] for first, last in blocks for layer in range(first + 1, last + 1))


# ---- dynamic programming -----------------------------------------------------------------------------------------

_Cell = tuple[float, int, int]
"""Cost so far; the first layer of the run that ends here; the weight in front of it. A run of one layer is no block."""


def _table(matrix: Matrix, weights: Sequence[int], most: int) -> list[list[_Cell]]:
    """``table[end][weight]``: the cheapest way to cut layers ``0 .. end - 1`` into runs whose lazy layers weigh that.

    What weighs more than ``most`` is left out.
    """
    unreached: _Cell = (math.inf, 0, 0)
    table = [[unreached] * (most + 1) for _ in range(len(matrix) + 1)]
    table[0][0] = (0.0, 0, 0)
    for first in range(len(matrix)):
        cost, weight = 0.0, 0
        for layer in range(first, len(matrix)):
            if layer > first:
                cost += matrix[first][layer]
                weight += weights[layer]
            if not math.isfinite(cost):
                break
            row = table[layer + 1]
            for before, (spent, *_) in enumerate(table[first]):
                reached = before + weight
                if reached <= most and spent + cost < row[reached][0]:
                    row[reached] = (spent + cost, first, before)
    return table


def _traced(table: list[list[_Cell]], weight: int) -> tuple[Block, ...] | None:
    end = len(table) - 1
    if not math.isfinite(table[end][weight][0]):
        return None
    blocks: list[Block] = []
    while end:
        _, first, weight = table[end][weight]
        if end - 1 > first:
            blocks.append((first, end - 1))
        end = first
    return tuple(reversed(blocks))
