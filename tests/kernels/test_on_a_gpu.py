"""The operators on a GPU, as the models call them: through the dispatcher, at real sizes, compiled and in CUDA graphs.

`_triton_cases.py` holds every kernel against its reference on small awkward shapes, in all dtypes. Here are shapes of
7B models, buffers beyond the reach of 32-bit addresses, and what only a device can show: that nothing waits for it, and
that a captured call reads its ranges anew at each replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

import avl_fx.kernels.attention as attention
import avl_fx.kernels.partition as partition
import avl_fx.kernels.partitioned_decode as partitioned_decode
import avl_fx.kernels.visual_scores as visual_scores
from avl_fx.partition import Partition
from avl_fx.policies import VisionPolicy
from tests._gpu import DEVICE, NEEDS_GPU, free_memory, plain_float32  # noqa: F401  (a fixture)

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("plain_float32")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = ((32, 32), (32, 8), (28, 4))
"""LLaVA-1.5 and LLaVA-NeXT, Llama 3 and Mistral, Qwen2.5-VL."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest error over largest value. Half precision: two roundings of the result and one of the probabilities."""
WEIGHTS = 1e-5
"""The same for weights and scores, which are float32 in all dtypes: another order of summation."""
SCALE, LARGE = 128**-0.5, 2**40


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value; NaN counts as infinite."""
    difference = (actual.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference / expected.double().abs().max().item()


def ranges(*rows: list[tuple[int, int]]) -> Tensor:
    """``segments`` of the operator: unused entries in front, between and behind those of each row."""
    table = torch.zeros(len(rows), 64, 2, dtype=torch.int64)
    for row, pairs in enumerate(rows):
        for entry, pair in enumerate(pairs):
            table[row, 3 * entry + row] = torch.tensor(pair)
    return table.to(DEVICE)


def wish(wanted: bool) -> Tensor:
    return torch.tensor([int(wanted)], dtype=torch.int32, device=DEVICE)


def cases(first: str, *others: str) -> list[tuple[int, int, torch.dtype, str]]:
    """All heads and dtypes with the ``first`` kind of mask, all heads with the others in bfloat16."""
    return [(*heads, dtype, first) for heads in HEADS for dtype in DTYPES] + [
        (*heads, torch.bfloat16, other) for heads in HEADS for other in others
    ]


def named(case: tuple[object, ...]) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


KEYS = 2912
RAGGED = (
    [(0, 16 + 864), (2896, LARGE)],
    [(0, LARGE)],
    [(5, 1000), (1500, 3), (2000, 64), (2911, 1)],
)
"""Text and 30% of 2,880 visual keys; everything; some ranges that end nowhere in particular."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Tests of one function with many shapes would use up its recompile limit."""
    torch._dynamo.reset()


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- avl::partitioned_decode -----------------------------------------------------------------------------------------


def decode_operands(
    heads: int, kv_heads: int, dtype: torch.dtype, append: bool = True, capacity: int = KEYS + 70
) -> tuple[Tensor, ...]:
    """Query, key, value and the new rows of three batch rows. The cache is part of a buffer that is NaN elsewhere."""
    buffers = [torch.full((3, kv_heads, capacity, 128), torch.nan, device=DEVICE, dtype=dtype) for _ in range(2)]
    for seed, buffer in enumerate(buffers):
        buffer[:, :, :KEYS] = drawn(3, kv_heads, KEYS, 128, dtype=dtype, seed=seed)
    new = [drawn(3, kv_heads, 1, 128, dtype=dtype, seed=seed) for seed in (2, 3)] if append else [None, None]
    return drawn(3, heads, 1, 128, dtype=dtype, seed=4), *(buffer[:, :, :KEYS] for buffer in buffers), *new


@pytest.mark.parametrize("case", cases("none", "bool", "additive"), ids=named)
def test_decode(case: tuple[int, int, torch.dtype, str]) -> None:
    heads, kv_heads, dtype, mask = case
    query, key, value, new_key, new_value = decode_operands(heads, kv_heads, dtype)
    visible = drawn(3, 1, 1, KEYS + 1, seed=5) > -0.5
    masks = {"none": None, "bool": visible, "additive": drawn(3, 1, 1, KEYS + 1, seed=6).to(dtype)}
    rest = (masks[mask], ranges(*RAGGED), wish(True), SCALE)
    whole = [torch.cat(pair, 2) for pair in ((key, new_key), (value, new_value))]
    expected = partitioned_decode.partitioned_decode_reference(query, *whole, None, None, *rest)
    out, weights = torch.ops.avl.partitioned_decode(query, key, value, new_key, new_value, *rest)
    assert error(out, expected[0]) <= TOLERANCE[dtype]
    assert error(weights, expected[1]) <= WEIGHTS
    for cache, rows in ((key, whole[0]), (value, whole[1])):
        longer = cache.as_strided((3, kv_heads, KEYS + 1, 128), cache.stride())
        assert torch.equal(longer, rows), "the new row is stored behind the others, which stay as they were"


def test_decode_does_not_wait() -> None:
    query, key, value, new_key, new_value = decode_operands(28, 4, torch.bfloat16)
    rest = (None, ranges(*RAGGED), wish(True), SCALE)
    torch.ops.avl.partitioned_decode(query, key, value, new_key, new_value, *rest)
    torch.cuda.synchronize()
    with nothing_waits():
        torch.ops.avl.partitioned_decode(query, key, value, new_key, new_value, *rest)


def test_decode_beyond_32_bit_addresses() -> None:
    """The last head of the last row stands behind more than 2**31 elements; so do the mask's last entries."""
    kv_heads, keys = 8, 1_050_000
    needed = 2 * 2 * kv_heads * keys * 128 * 2
    if free_memory() < 1.5 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    key, value = (torch.zeros(2, kv_heads, keys + 1, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    assert key.numel() > 2**31
    read = [(0, 40), (500_000, 40), (keys - 40, 41)]
    for seed, cache in enumerate((key, value)):
        for start, length in read:
            cache[:, :, start : start + length] = drawn(2, kv_heads, length, 128, dtype=torch.bfloat16, seed=seed)
    new = [cache[:, :, keys:].clone() for cache in (key, value)]
    query, table = drawn(2, 16, 1, 128, dtype=torch.bfloat16, seed=7), ranges(read, read)
    stored = (key[:, :, :keys], value[:, :, :keys])
    out, weights = torch.ops.avl.partitioned_decode(query, *stored, *new, None, table, wish(True), SCALE)
    small = [torch.cat([cache[:, :, s : s + n] for s, n in read], 2) for cache in (key, value)]
    everything = ranges([(0, LARGE)], [(0, LARGE)])
    expected = partitioned_decode.partitioned_decode_reference(
        query, *small, None, None, None, everything, wish(True), SCALE
    )
    assert error(out, expected[0]) <= TOLERANCE[torch.bfloat16]
    assert error(torch.cat([weights[:, :, s : s + n] for s, n in read], 2), expected[1]) <= WEIGHTS
    assert torch.equal(key[:, :, keys:], new[0])


def test_decode_through_inductor() -> None:
    """One compilation serves all lengths of a cache, and the row is stored there as well."""
    compiled = torch.compile(
        lambda *operands: torch.ops.avl.partitioned_decode(*operands, SCALE)[0] * 2.0, fullgraph=True, dynamic=True
    )
    for number, shorter in enumerate((0, 7, 1000)):
        query, key, value, new_key, new_value = decode_operands(28, 4, torch.bfloat16)
        key, value = key[:, :, : KEYS - shorter], value[:, :, : KEYS - shorter]
        whole = [torch.cat(pair, 2) for pair in ((key, new_key), (value, new_value))]
        rest = (None, ranges(*RAGGED), wish(False))
        expected, _ = partitioned_decode.partitioned_decode_reference(query, *whole, None, None, *rest, SCALE)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = compiled(query, key, value, new_key, new_value, *rest)
        assert error(got, expected * 2.0) <= TOLERANCE[torch.bfloat16]
        assert torch.equal(key.as_strided(new_key.shape, key.stride(), (KEYS - shorter) * 128), new_key)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` in a CUDA graph, after a run that compiles what it launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_decode_in_a_cuda_graph() -> None:
    """A replay reads the ranges, the wish for weights and the rows that are there then."""
    query, key, value, _, _ = decode_operands(32, 8, torch.bfloat16, append=False)
    table, wanted, results = ranges(*RAGGED), wish(True), {}

    def call() -> None:
        results["out"], results["weights"] = torch.ops.avl.partitioned_decode(
            query, key, value, None, None, None, table, wanted, SCALE
        )

    graph = captured(call)
    for seed, rows in enumerate((RAGGED, ([(0, 3)], [(1000, 500), (0, 2)], [(0, LARGE)]))):
        table.copy_(ranges(*rows))
        key.copy_(drawn(*key.shape, dtype=key.dtype, seed=20 + seed))
        graph.replay()
        expected = partitioned_decode.partitioned_decode_reference(
            query, key, value, None, None, None, table, wanted, SCALE
        )
        assert error(results["out"], expected[0]) <= TOLERANCE[torch.bfloat16]
        assert error(results["weights"], expected[1]) <= WEIGHTS
    wanted.zero_()
    table.copy_(ranges(*RAGGED))
    graph.replay()
    expected = partitioned_decode.partitioned_decode_reference(
        query, key, value, None, None, None, table, wish(True), SCALE
    )
    assert error(results["out"], expected[0]) <= TOLERANCE[torch.bfloat16]
    # What they hold instead is nobody's business; here even memory that nobody wrote is filled anew.
    assert error(results["weights"], expected[1]) > 0.1, "weights that nobody asked for are not computed"


def test_decode_opcheck() -> None:
    query, key, value, _, _ = decode_operands(28, 4, torch.bfloat16, append=False)
    arguments = (query, key, value, None, None, None, ranges(*RAGGED), wish(True), SCALE)
    torch.library.opcheck(torch.ops.avl.partitioned_decode.default, arguments)


# ---- avl::visual_scores ----------------------------------------------------------------------------------------------


def prompt_mask(queries: int, keys: int, padding: tuple[int, ...]) -> Tensor:
    """bool ``[batch, 1, queries, keys]``: causal, so many keys on the left are padding, which sees itself."""
    query, key = torch.arange(queries, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    rows = [(key <= query) & ((key >= left) | (key == query)) for left in padding]
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("case", cases("causal", "bool", "additive"), ids=named)
def test_scores(case: tuple[int, int, torch.dtype, str]) -> None:
    """A prompt of 612 tokens, padded on the left, in a static cache with room for 40 more where there is a mask."""
    heads, kv_heads, dtype, kind = case
    length, room = 612, 0 if kind == "causal" else 40
    query, key = drawn(2, heads, length, 128, dtype=dtype), drawn(2, kv_heads, length + room, 128, dtype=dtype, seed=1)
    visible = prompt_mask(length, length + room, (0, 13))
    bias = torch.zeros(visible.shape, dtype=dtype, device=DEVICE).masked_fill(~visible, torch.finfo(dtype).min)
    mask = {"causal": None, "bool": visible, "additive": bias}[kind]
    positions = None if kind == "causal" else torch.arange(length, device=DEVICE)
    for window in (1, 16):
        arguments = (query, key, mask, positions, SCALE, kind == "causal", window)
        expected = visual_scores.visual_scores_reference(*arguments)
        assert error(torch.ops.avl.visual_scores(*arguments), expected) <= WEIGHTS


def test_scores_do_not_wait() -> None:
    query, key = drawn(2, 28, 612, 128, dtype=torch.bfloat16), drawn(2, 4, 612, 128, dtype=torch.bfloat16, seed=1)
    mask = prompt_mask(612, 612, (0, 13))
    torch.ops.avl.visual_scores(query, key, mask, None, SCALE, False, 1)
    torch.cuda.synchronize()
    with nothing_waits():
        torch.ops.avl.visual_scores(query, key, mask, None, SCALE, False, 1)


def test_scores_beyond_32_bit_addresses() -> None:
    """The mask of a long prompt has more than 2**31 entries; the last row of it scores."""
    length = 46_400
    if free_memory() < 3 * length**2:
        pytest.skip(f"needs {3 * length**2 / 2**30:.0f} GiB of device memory")
    query, key = (drawn(1, 2, length, 16, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE)
    assert mask.numel() > 2**31
    mask[0, 0, -1, : length // 2] = False
    got = torch.ops.avl.visual_scores(query, key, mask, None, 0.25, False, 1)
    logits = (query[:, :, -1:].float() @ key.float().transpose(-1, -2)).squeeze(2) * 0.25
    expected = logits.masked_fill(~mask[:, :, -1], -torch.inf).softmax(-1)
    assert error(got, expected) <= WEIGHTS


def test_scores_through_inductor() -> None:
    compiled = torch.compile(
        lambda query, key: torch.ops.avl.visual_scores(query, key, None, None, SCALE, True, 2) * 2.0,
        fullgraph=True,
        dynamic=True,
    )
    for number, length in enumerate((612, 613, 1400)):
        query, key = drawn(2, 28, length, 128, dtype=torch.bfloat16), drawn(2, 4, length, 128, dtype=torch.bfloat16)
        expected = visual_scores.visual_scores_reference(query, key, None, None, SCALE, True, 2)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert error(compiled(query, key), expected * 2.0) <= WEIGHTS


def test_scores_in_a_cuda_graph() -> None:
    query, key = drawn(2, 32, 612, 128, dtype=torch.bfloat16), drawn(2, 8, 612, 128, dtype=torch.bfloat16, seed=1)
    mask, results = prompt_mask(612, 612, (0, 13)), {}

    def call() -> None:
        results["scores"] = torch.ops.avl.visual_scores(query, key, mask, None, SCALE, False, 1)

    graph = captured(call)
    key.copy_(drawn(*key.shape, dtype=key.dtype, seed=9))
    mask.copy_(prompt_mask(612, 612, (40, 0)))
    graph.replay()
    expected = visual_scores.visual_scores_reference(query, key, mask, None, SCALE, False, 1)
    assert error(results["scores"], expected) <= WEIGHTS


# ---- avl::partition_ -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 8])
def test_moves(dtype: torch.dtype, groups: int) -> None:
    """The visual rows of two caches change places among themselves; the second has fewer of them."""
    caches = [drawn(2, 8, KEYS, 128, dtype=dtype, seed=seed) for seed in (0, 1)]
    expected = [cache.clone() for cache in caches]
    slots = torch.arange(16, 16 + 2880, device=DEVICE).repeat(2, 1)
    order = drawn(2, groups, 2880, seed=3).argsort(-1)
    order[1, :, 2000:] = 0  # of no meaning: nothing moves there
    order[1, :, :2000] = drawn(groups, 2000, seed=4).argsort(-1)
    source = slots[:, None].expand(-1, groups, -1).gather(2, order)
    slots[1, 2000:] = -1
    partition.partition_reference(*expected, source, slots[:, None])
    partition.partition_(*caches, source, slots)
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache, wanted)


def test_moves_beyond_32_bit_addresses() -> None:
    keys = 1_050_000
    needed = 2 * 8 * keys * 128 * 2
    if free_memory() < 1.5 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    key = torch.zeros(2, 8, keys, 128, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.tensor([5, 500_000, keys - 3, keys - 1], device=DEVICE)
    before = drawn(2, 8, 4, 128, dtype=torch.bfloat16)
    key[:, :, rows] = before
    order = torch.tensor([3, 2, 0, 1], device=DEVICE)
    partition.partition_(key, None, rows[order].expand(2, 1, 4), rows.expand(2, 4))
    assert torch.equal(key[:, :, rows], before[:, :, order])


@pytest.mark.parametrize("scores", ["shared", "per_kv_head"])
def test_layers_choose_and_move_at_once_and_nothing_waits(scores: Literal["shared", "per_kv_head"]) -> None:
    """Prompts and refreshes of layers of which one is laid out differently, as the CPU does them one by one."""
    visual = torch.zeros(2, KEYS, dtype=torch.bool)
    visual[0, 16 : 16 + 2880] = visual[1, 500:2500] = True
    policy = VisionPolicy(core=0.3, secondary=0.5, refresh=1, scores=scores)
    here, there = (Partition.start(policy, visual) for _ in range(2))
    assert here is not None
    assert there is not None
    there.to(torch.device(DEVICE))
    layers = (0, 1, 5, 6)
    caches = {
        layer: [drawn(2, 8, KEYS, 128, dtype=torch.bfloat16, seed=2 * layer + n) for n in (0, 1)] for layer in layers
    }
    caches[5][0] = caches[5][0].transpose(1, 2).contiguous().transpose(1, 2)
    expected = {layer: [cache.cpu() for cache in pair] for layer, pair in caches.items()}

    def move(state: Partition, caches: dict[int, list[Tensor]], weights: dict[int, Tensor], prompt: bool) -> None:
        for moves in state.first_moves(weights) if prompt else state.next_moves(weights):
            pairs = [(*caches[layer], number) for number, layer in enumerate(moves.layers)]
            partition.partition_layers_(pairs, moves.source, moves.slots)

    for step in range(4):
        # Whole numbers: their mean does not depend on the order of summation, and ties happen.
        weights = {layer: drawn(2, 8, KEYS, seed=10 * step + layer).mul(200).round() for layer in layers}
        move(here, expected, {layer: rows.cpu() for layer, rows in weights.items()}, prompt=step % 2 == 0)
        torch.cuda.synchronize()
        with nothing_waits() if step >= 2 else contextlib.nullcontext():
            move(there, caches, weights, prompt=step % 2 == 0)
        for layer in layers:
            assert torch.equal(there.tokens[layer].cpu(), here.tokens[layer])
            assert all(torch.equal(a.cpu(), b) for a, b in zip(caches[layer], expected[layer], strict=True))


def test_moves_of_layers_beyond_their_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take turns, and the table of addresses goes on where the turn before ended."""
    from avl_fx.kernels.partition import triton

    monkeypatch.setattr(triton, "MOST_SCRATCH", 2 * 2 * 8 * 500 * 128 * 2)
    caches = [[drawn(2, 8, KEYS, 128, dtype=torch.bfloat16, seed=2 * n + m) for m in (0, 1)] for n in range(5)]
    expected = [[cache.clone() for cache in pair] for pair in caches]
    slots = drawn(5, 2, 8, KEYS, seed=1).argsort(-1)[..., :500]
    source = slots.gather(-1, drawn(5, 2, 8, 500, seed=2).argsort(-1))
    for number, pair in enumerate(expected):
        partition.partition_(*pair, source[number], slots[number])
    partition.partition_layers_([(*pair, number) for number, pair in enumerate(caches)], source, slots)
    for pair, wanted in zip(caches, expected, strict=True):
        assert all(map(torch.equal, pair, wanted))


# ---- avl::attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_lowered_attention(heads: int, kv_heads: int, queries: int, mask: str) -> None:
    """What canonical attention becomes, and what Inductor makes of it for the last of the models."""
    keys = queries if mask == "causal" else 700
    query = drawn(2, heads, queries, 128, dtype=torch.bfloat16)
    key, value = (drawn(2, kv_heads, keys, 128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    visible = drawn(2, 1, queries, keys, seed=3) > -0.5
    masks = {"bool": visible, "additive": drawn(2, 1, queries, keys, dtype=torch.bfloat16, seed=4)}
    operands = (query, key, value, masks.get(mask))
    lowering = attention.LOWERINGS["cuda"]

    def attend(*operands: Tensor | None) -> Tensor:
        return lowering(*operands, SCALE, mask == "causal")

    expected = attention.attention_reference(*operands, SCALE, mask == "causal")
    assert error(attend(*operands), expected) <= TOLERANCE[torch.bfloat16]
    if (heads, kv_heads) == HEADS[-1]:
        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        assert error(compiled(*operands), expected) <= TOLERANCE[torch.bfloat16]
