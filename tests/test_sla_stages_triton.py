"""SLA's stages before attention as Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, on import
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import itertools
import math

import pytest
import sweep

from dit_accel.kernels.block_linear import forward as block_linear_triton
from dit_accel.kernels.block_linear.forward import block_states, linear_state, marginal_linear_state, marginal_states
from dit_accel.kernels.selection import select as block_select_triton
from dit_accel.kernels.selection.pool import pool_blocks, pool_pair
from dit_accel.kernels.selection.select import select_blocks
from dit_accel.kernels.tiling import Tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter's bf16 dot is wrong
BATCH, HEADS, BEFORE, AFTER = 2, 2, 3, 2
# grid, query tile, key tile: full and short tiles, lane counts that are no power of two, more than one chunk
GRIDS = {
    "raster": ((50,), (32,), (12,)),
    "long box": ((150,), (16,), (100,)),
    "2-D": ((5, 7), (2, 4), (3, 3)),
    "3-D": ((3, 5, 4), (2, 4, 3), (2, 3, 3)),
    # tiles that a tensor descriptor supports
    "2-D, descriptors": ((9, 7), (4, 4), (4, 4)),
    "3-D, descriptors": ((3, 9, 6), (2, 4, 4), (2, 4, 4)),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN, so that unwritten outputs and reads of uninitialized memory show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def box_tokens(grid, box):
    """Rows of the tokens of each tile, tiles and tokens in raster order."""
    counts = [range(-(-n // side)) for n, side in zip(grid, box, strict=True)]
    boxes = []
    for corner in itertools.product(*counts):
        sides = [range(c * s, min(c * s + s, n)) for c, s, n in zip(corner, box, grid, strict=True)]
        tokens = itertools.product(*sides)
        boxes.append([BEFORE + sum(x * math.prod(grid[i + 1 :]) for i, x in enumerate(t)) for t in tokens])
    return boxes


def inputs(grid, dim, dtype, padded, tokens_first, n=3):
    """Tensors (B, H, S, D) and the mask; rows that must not be read are NaN."""
    length = BEFORE + math.prod(grid) + AFTER
    shape = (BATCH, length, HEADS, dim) if tokens_first else (BATCH, HEADS, length, dim)
    xs = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(n)]
    xs = [x.transpose(1, 2) if tokens_first else x for x in xs]
    real = None
    if padded:  # in the second element one tile and most ends of the others have no valid token
        real = torch.rand(BATCH, length, device=DEVICE) < 0.6
        real[1, : BEFORE + math.prod(grid) // 2] = False
    for x in xs:
        x[:, :, :BEFORE] = x[:, :, length - AFTER :] = torch.nan
        if padded:
            x.masked_fill_(~real[:, None, :, None], torch.nan)
    return *xs, real


def by_box(x, boxes, real):
    """Valid rows of each tile of x for each batch element, (H, n, D) float64 each."""
    kept = [[[t for t in box if real is None or real[b, t]] for box in boxes] for b in range(BATCH)]
    return [[x[b][:, rows].double() for rows in kept[b]] for b in range(BATCH)]


def error(x, exact):
    assert x.shape == exact.shape
    return float((x.double() - exact).norm() / exact.norm())


def phi(x, feature_map):
    if feature_map == "softmax":
        return torch.softmax(x, -1)
    return torch.nn.functional.elu(x) + 1 if feature_map == "elu" else x.relu()


POOLED = [
    ("raster", 40, torch.float16, True),
    ("long box", 128, torch.float32, False),
    ("2-D", 80, torch.bfloat16, False),
    ("3-D", 16, torch.float32, True),
    ("3-D", 256, torch.float16, False),
    ("2-D", 64, torch.float64, True),
]


@pytest.mark.parametrize(
    "grid, dim, dtype, tokens_first, padded",
    # each grid with padding and without
    sweep.keep([(*x, padded) for x in POOLED for padded in (False, True)], lambda x: x[4] == (POOLED.index(x[:4]) < 4)),
)
def test_pooled_blocks_are_means_of_valid_tokens(grid, dim, dtype, tokens_first, padded):
    shape, q_box, k_box = GRIDS[grid]
    query, key, real = inputs(shape, dim, dtype, padded, tokens_first, n=2)
    tilings = [Tiling.of(shape, box) for box in (q_box, k_box)]
    pair = pool_pair(query, key, *tilings, BEFORE, real)
    for x, box, tiling, pooled in zip((query, key), (q_box, k_box), tilings, pair, strict=True):
        rows = by_box(x, box_tokens(shape, box), real)
        exact = torch.stack([torch.stack([r.sum(1) / max(1, r.shape[1]) for r in element], 1) for element in rows])
        assert pooled.dtype == torch.float32
        assert error(pooled, exact) < 2e-7
        assert error(pool_blocks(x, tiling, BEFORE, real), exact) < 2e-7  # in chunks of its own, so not the same bits


def test_pool_pair_refuses_two_grids():
    x = torch.zeros(1, 1, 12, 16, device=DEVICE)
    with pytest.raises(ValueError, match="one grid"):
        pool_pair(x, x, Tiling.of((12,), (4,)), Tiling.of((3, 4), (2, 2)), 0)


def expected_choice(scores, n_critical, n_negligible, filled, n_max):
    """Expected lists and map by a stable sort of each row: equal scores rank by index."""
    groups, n_q, n_k = scores.shape
    lists = torch.zeros(groups, n_q, n_max, dtype=torch.int32)
    marginal = torch.zeros(groups, n_q, n_k)
    for g, i in itertools.product(range(groups), range(n_q)):
        b = g // HEADS
        ranked = sorted((j for j in range(n_k) if filled[b][j]), key=lambda j: -scores[g, i, j].item())
        top = sorted(ranked[: n_critical[b]])
        lists[g, i, : len(top)] = torch.tensor(top)
        marginal[g, i, ranked[n_critical[b] : max(0, len(ranked) - n_negligible[b])]] = 1
    return lists, marginal


def check_choice(pooled_q, pooled_k, n_critical, n_negligible, filled=None, dtype=torch.float32):
    """Compare with the expected lists and map. Counts are ints, or lists with one per batch element."""
    per_batch = isinstance(n_critical, list)
    counts = [torch.tensor(n, dtype=torch.int32, device=DEVICE) if per_batch else n for n in (n_critical, n_negligible)]
    lists, marginal = select_blocks(pooled_q, pooled_k, *counts, filled, map_dtype=dtype)
    scores = (pooled_q.double() @ pooled_k.double().mT).flatten(0, 1)
    n_k = pooled_k.shape[2]
    rows = [[True] * n_k] * BATCH if filled is None else filled.expand(BATCH, -1).tolist()
    critical, negligible = (n if per_batch else [n] * BATCH for n in (n_critical, n_negligible))
    expected = expected_choice(scores.cpu(), critical, negligible, rows, max(critical))
    assert lists.dtype == torch.int32 and marginal.dtype == dtype
    assert torch.equal(lists.cpu(), expected[0])
    assert marginal.shape[2] == -(-n_k // 16) * 16 and not marginal[..., n_k:].any()
    assert torch.equal(marginal[..., :n_k].cpu().float(), expected[1])


def pooled(n_q, n_k, dim):
    return (torch.randn(BATCH, HEADS, n, dim, device=DEVICE) for n in (n_q, n_k))


@pytest.mark.parametrize("n_k, dim, n_critical, n_negligible", [(1, 16, 1, 0), (13, 40, 2, 3), (70, 80, 7, 0)])
def test_highest_blocks_are_critical_and_lowest_negligible(n_k, dim, n_critical, n_negligible):
    check_choice(*pooled(5, n_k, dim), n_critical, n_negligible, dtype=torch.float16)


def test_lists_come_without_the_map():
    query, key = pooled(2, 9, 16)
    alone, none = select_blocks(query, key, 3, 2, want_marginal=False)
    assert none is None and torch.equal(alone, select_blocks(query, key, 3, 2)[0])


def test_every_block_can_be_critical():
    check_choice(*pooled(2, 9, 16), 9, 0)


def test_rows_longer_than_a_tile_of_scores():
    query, key = pooled(65, 65, 80)
    check_choice(query[:1, :1], key[:1, :1], 4, 6)


def test_more_blocks_than_one_warp_holds():
    check_choice(*pooled(1, 1100, 16), 55, 110)


@pytest.mark.parametrize("values", [(1,), (0,), (0, 0, -1, 1)])
def test_equal_scores_rank_by_index(values):
    """All equal, all 0 of either sign, and a few values repeated many times."""
    query, key = (torch.randint(0, len(values), (BATCH, HEADS, n, 16), device=DEVICE) for n in (4, 20))
    table = torch.tensor(values, dtype=torch.float32, device=DEVICE)
    query, key = table[query], table[key]
    query[:, :, 0] *= -1
    key[..., 1:] = 0
    check_choice(query, key, 5, 4)


@pytest.mark.parametrize("shared", [False, True])
def test_empty_blocks_are_neither_selected_nor_counted(shared):
    filled = torch.rand(1 if shared else BATCH, 21, device=DEVICE) < 0.5
    filled[-1, :3] = True
    check_choice(*pooled(3, 21, 40), 3, 2, filled)


def test_counts_that_differ_by_batch_element():
    filled = torch.ones(BATCH, 21, dtype=torch.bool, device=DEVICE)
    filled[1, 4:] = False
    check_choice(*pooled(3, 21, 40), [6, 1], [4, 0], filled)


def test_element_without_valid_blocks_has_empty_lists():
    filled = torch.ones(BATCH, 21, dtype=torch.bool, device=DEVICE)
    filled[0] = False
    check_choice(*pooled(3, 21, 40), [1, 4], [0, 2], filled)


def test_heads_in_chunks_select_the_same_blocks(monkeypatch):
    monkeypatch.setattr(block_select_triton, "SCRATCH_BYTES", 1)
    filled = torch.rand(BATCH, 13, device=DEVICE) < 0.7
    check_choice(*pooled(3, 13, 16), [3, 2], [2, 1], filled)


@pytest.mark.parametrize("n_critical, n_negligible", [(4, 3), ([5, 2], [3, 1])])
def test_sorting_fallback_selects_the_same(monkeypatch, n_critical, n_negligible):
    monkeypatch.setattr(block_select_triton, "MAX_BLOCKS", 0)
    filled = torch.rand(BATCH, 21, device=DEVICE) < 0.7
    query, key = pooled(3, 21, 16)
    check_choice(query.round(), key.round(), n_critical, n_negligible, filled)


def test_zeros_of_either_sign_are_equal_and_nan_is_above_all():
    inf, nan = torch.inf, torch.nan
    values = [0.0, -0.0, 1e-45, -1e-45, inf, -inf, -nan, 2.0, -2.0, 0.0, -0.0]
    scores = torch.tensor(values, device=DEVICE).expand(1, 1, -1)
    scores = torch.nn.functional.pad(scores, (0, 5), value=3.0)  # padding of a row is not a block
    order = [6, 4, 7, 2, 0, 1, 9, 10, 3, 8, 5]
    for n_critical in range(1, 12):
        lists = torch.empty(1, 1, n_critical, dtype=torch.int32, device=DEVICE)
        block_select_triton._launch_pick(scores, 0, 1, 11, n_critical, 0, None, lists, None)
        assert lists[0, 0].tolist() == sorted(order[:n_critical])


def test_smooth_key_does_not_change_the_selection():
    query, key = pooled(4, 20, 40)
    plain = select_blocks(query, key, 4, 3)
    smooth = select_blocks(query, key - key.mean(2, keepdim=True), 4, 3)
    assert all(torch.equal(x, y) for x, y in zip(plain, smooth, strict=True))


# maximum relative error; in half precision that of one rounding of W, of φ and of the result
BAND = {torch.float32: 5e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}
CASES = [
    ("raster", 40, "softmax", True, True),
    ("long box", 64, "elu", False, False),
    ("2-D", 80, "relu", False, True),
    ("3-D", 16, "softmax", True, False),
    ("3-D", 128, "elu", False, True),
    ("2-D", 160, "softmax", True, False),
    ("2-D, descriptors", 32, "softmax", True, False),
    ("3-D, descriptors", 16, "elu", False, False),
]
cases = pytest.mark.parametrize(
    "grid, dim, feature_map, tokens_first, padded, dtype",
    sweep.cover(
        [(*case, dtype) for case in CASES for dtype in DTYPES],
        lambda grid, dim, feature_map, _, padded, dtype: ("box" in grid, dim % 64 > 0, feature_map, padded, dtype),
    ),
    ids=str,
)


def exact_sums(key, value, boxes, weight, feature_map, real):
    """Sums Σ φ(k)ᵀ v Wᵀ (B, H, M, D, D) and Σ φ(k) (B, H, M, D) of each tile, float64."""
    keys, values = by_box(key, boxes, real), by_box(value, boxes, real)
    sums = [
        torch.stack([phi(k, feature_map).mT @ v @ weight.double().mT for k, v in zip(ks, vs, strict=True)], 1)
        for ks, vs in zip(keys, values, strict=True)
    ]
    norms = [torch.stack([phi(k, feature_map).sum(1) for k in ks], 1) for ks in keys]
    return torch.stack(sums), torch.stack(norms)


def quotient(phi_q, state, norm, eps):
    """Linear attention of phi_q (..., n, D) with state (..., D, D), norm (..., D) and eps, broadcast to (..., 1, 1)."""
    return phi_q @ state.double() / (phi_q @ norm.double()[..., None] + eps)


@cases
def test_linear_state_is_the_mean_over_valid_keys(grid, dim, feature_map, tokens_first, padded, dtype):
    shape = GRIDS[grid][0]
    key, value, real = inputs(shape, dim, dtype, padded, tokens_first, n=2)
    weight = torch.randn(dim, dim, device=DEVICE) / dim**0.5
    state, norm, eps = linear_state(key, value, BEFORE, math.prod(shape), feature_map, weight, real)
    rounded = linear_state(key, value, BEFORE, math.prod(shape), feature_map, weight, real, dtype).state
    assert rounded.dtype == dtype and error(rounded, state.double()) < torch.finfo(dtype).eps
    sums, norms = exact_sums(key, value, box_tokens(shape, shape), weight, feature_map, real)
    on_grid = slice(BEFORE, BEFORE + math.prod(shape))
    count = torch.full((BATCH,), math.prod(shape)) if real is None else real[:, on_grid].sum(-1).cpu()
    count = count.double().to(DEVICE)[:, None, None, None]
    assert state.dtype == norm.dtype == eps.dtype == torch.float32
    assert error(state, sums[:, :, 0] / count) < BAND[dtype]
    assert error(norm, norms[:, :, 0] / count[..., 0]) < BAND[dtype]
    assert error(eps, (1e-5 / count[:, 0, 0, 0]).repeat_interleave(HEADS)) < 1e-6


def test_linear_state_sums_over_many_parts(monkeypatch):
    """1,000 keys in blocks of 256: the last is short, and one has no valid key."""
    key, value, real = inputs((1000,), 16, torch.float32, True, False, n=2)
    real[0, 100:700] = False
    weight = torch.eye(16, device=DEVICE)
    sums, norms = exact_sums(key, value, box_tokens((1000,), (1000,)), weight, "elu", real)
    state, norm, _ = linear_state(key, value, BEFORE, 1000, "elu", weight, real)
    count = real[:, BEFORE : BEFORE + 1000].sum(-1).double()[:, None, None]
    assert error(state, sums[:, :, 0] / count[..., None]) < 1e-6
    assert error(norm, norms[:, :, 0] / count) < 1e-6


def test_linear_state_without_valid_keys_is_zero():
    key, value, real = inputs((20,), 16, torch.float32, True, False, n=2)
    real[1] = False
    key[1] = value[1] = torch.nan
    state, norm, eps = linear_state(key, value, BEFORE, 20, "elu", torch.eye(16, device=DEVICE), real)
    assert not state[1].any() and not norm[1].any() and state[0].all()
    assert eps[HEADS:].tolist() == pytest.approx([1e-5] * HEADS)


@cases
def test_block_states_are_sums_over_the_volume(grid, dim, feature_map, tokens_first, padded, dtype):
    shape, _, box = GRIDS[grid]
    key, value, real = inputs(shape, dim, dtype, padded, tokens_first, n=2)
    weight = torch.randn(dim, dim, device=DEVICE) / dim**0.5
    tiling = Tiling.of(shape, box)
    states, norms = block_states(key, value, tiling, BEFORE, feature_map, weight, dtype, real)
    exact = [x / math.prod(box) for x in exact_sums(key, value, box_tokens(shape, box), weight, feature_map, real)]
    assert states.dtype == dtype and norms.dtype == torch.float32
    assert error(states, exact[0]) < BAND[dtype]
    assert error(norms, exact[1]) < BAND[dtype]


@cases
def test_marginal_linear_part_is_that_of_the_plain_sums(grid, dim, feature_map, tokens_first, padded, dtype):
    """Eps counts on the unnormalized sums; for queries of each block, and for a block without marginal blocks."""
    shape, _, box = GRIDS[grid]
    key, value, real = inputs(shape, dim, dtype, padded, tokens_first, n=2)
    weight = torch.randn(dim, dim, device=DEVICE) / dim**0.5
    tiling, n_q = Tiling.of(shape, box), 5
    chosen = torch.rand(BATCH * HEADS, n_q, tiling.n_tiles + 7, device=DEVICE) < 0.6
    chosen[:, 2] = False
    chosen[..., tiling.n_tiles :] = False
    longer = chosen.to(dtype)
    marginal = longer[..., : tiling.n_tiles]  # row stride larger than the row length
    padded_too = marginal_linear_state(longer, key, value, tiling, BEFORE, feature_map, weight, real, 3)
    state, norm, eps = marginal_linear_state(marginal, key, value, tiling, BEFORE, feature_map, weight, real, 3)
    sums, norms = exact_sums(key, value, box_tokens(shape, box), weight, feature_map, real)
    whole = marginal.double() @ sums.flatten(0, 1).flatten(2), marginal.double() @ norms.flatten(0, 1)
    whole = whole[0].unflatten(-1, (dim, dim)), whole[1]
    assert state.dtype == dtype and norm.dtype == eps.dtype == torch.float32
    assert error(norm, whole[1] / (3 * math.prod(box))) < BAND[dtype]
    queries = phi(torch.randn(BATCH * HEADS, n_q, 4, dim, device=DEVICE, dtype=torch.float64), feature_map)
    exact = quotient(queries, *whole, 1e-5)
    assert error(quotient(queries, state, norm, eps[:, None, None, None]), exact) < BAND[dtype]
    assert not state[:, 2].any() and not norm[:, 2].any()
    assert error(padded_too.state, state.double()) < BAND[dtype] and torch.equal(padded_too.norm, norm)
    # its two halves, with another count as divisor
    parts = block_states(key, value, tiling, BEFORE, feature_map, weight, dtype, real)
    two = marginal_states(marginal, *parts, tiling.volume)
    assert error(quotient(queries, two.state, two.norm, two.eps[:, None, None, None]), exact) < BAND[dtype]


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_many_large_sums_do_not_overflow_half_precision(feature_map):
    """Values of 300 with features of 30: their sum over 240 keys is 2e6."""
    key, value, _ = inputs((240,), 16, torch.float16, False, False, n=2)
    key = key.abs() + 30
    value = value + 300
    marginal = torch.ones(BATCH * HEADS, 1, 10, dtype=torch.float16, device=DEVICE)
    weight = torch.eye(16, device=DEVICE)
    tiling = Tiling.of((240,), (24,))
    state, norm, eps = marginal_linear_state(marginal, key, value, tiling, BEFORE, feature_map, weight)
    one = torch.ones(BATCH * HEADS, 1, 1, 16, dtype=torch.float64, device=DEVICE)
    mean = quotient(one, state, norm, eps[:, None, None, None])
    assert (mean - 300).abs().max() < 1


def test_heads_in_chunks_give_the_same_states(monkeypatch):
    shape, _, box = GRIDS["raster"]
    key, value, real = inputs(shape, 16, torch.float16, True, True, n=2)
    tiling, weight = Tiling.of(shape, box), torch.randn(16, 16, device=DEVICE)
    marginal = (torch.rand(BATCH * HEADS, 3, tiling.n_tiles, device=DEVICE) < 0.6).half()
    at_once = marginal_linear_state(marginal, key, value, tiling, BEFORE, "softmax", weight, real)
    monkeypatch.setattr(block_linear_triton, "SCRATCH_BYTES", 1)
    one_by_one = marginal_linear_state(marginal, key, value, tiling, BEFORE, "softmax", weight, real)
    assert all(error(x, y.double()) < 5e-4 for x, y in zip(one_by_one, at_once, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="programs run one after the other in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bit_identical(dtype):
    shape, q_box, box = GRIDS["2-D"]
    query, key, value, real = inputs(shape, 64, dtype, True, False)
    tilings = Tiling.of(shape, q_box), Tiling.of(shape, box)
    weight = torch.randn(64, 64, device=DEVICE)

    def run():
        lists, marginal = select_blocks(*pool_pair(query, key, *tilings, BEFORE, real), 2, 1, map_dtype=dtype)
        some = marginal_linear_state(marginal, key, value, tilings[1], BEFORE, "elu", weight, real)
        return lists, marginal, *some, *linear_state(key, value, BEFORE, math.prod(shape), "elu", weight, real)

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))
