"""LLSA's Triton kernels, by stage and as a whole: on a GPU if there is one, else in Triton's interpreter. The expected
values come from ``llsa.reference`` in float64, which test_functional_agreement.py compares with an independent
oracle."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, on import

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import sweep

from dit_accel import LLSAAttnProcessor, TokenLayout
from dit_accel.functional import llsa_attention
from dit_accel.kernels.llsa import select as llsa_select_triton
from dit_accel.kernels.llsa.forward import LaunchConfig, llsa_blocks_attention
from dit_accel.kernels.llsa.select import select_tree
from dit_accel.kernels.llsa.tree import pool_tree
from dit_accel.mechanisms import llsa
from dit_accel.mechanisms._inputs import AttentionInputs
from dit_accel.mechanisms._tree import make_tree, tile_shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter's bf16 dot is wrong
L = TokenLayout
# layout, head dim, heads, tokens first in memory, options
CASES = {
    "whole, 2 levels": (L((16, 16)), 64, 1, True, {"block_size": 16, "topk": 8, "levels": 2}),
    "whole, uneven lists": (L((16, 8)), 16, 2, False, {"block_size": 8, "topk": 3, "levels": 2}),
    "whole, 3 levels": (L((64,)), 16, 2, True, {"block_size": 4, "topk": 3, "levels": 3}),
    "2-D, text": (L((9, 11), 3, 2), 40, 2, True, {"block_size": 8, "topk": 3, "levels": 3}),
    "3-D, text before": (L((3, 7, 5), 4), 64, 1, False, {"block_size": 12, "topk": 3, "levels": 2}),
    "3-D, long head": (L((2, 5, 7)), 128, 1, True, {"block_size": 8, "topk": 3, "levels": 2}),
    "1-D, text after": (L((125,), 0, 5), 16, 1, True, {"block_size": 8, "topk": 3, "levels": 4}),
    "1 level": (L((11, 17), 0, 2), 40, 1, True, {"block_size": 16, "topk": 3, "levels": 1}),
    "large blocks": (L((13, 23)), 16, 1, True, {"block_size": 64, "topk": 3, "levels": 1}),
    "larger than a tile of queries": (L((90,)), 16, 1, True, {"block_size": 70, "topk": 1, "levels": 2}),
    "more text than grid": (L((20,), 150, 60), 16, 1, True, {"block_size": 4, "topk": 2, "levels": 2}),
    "not enriched": (L((9, 11)), 16, 2, True, {"block_size": 8, "topk": 3, "levels": 2, "enrich": False}),
    "not enriched, text": (L((9, 11), 2, 1), 16, 1, True, {"block_size": 8, "topk": 3, "levels": 3, "enrich": False}),
    "tiny": (L((3,), 1), 16, 1, True, {"block_size": 16, "topk": 8, "levels": 2}),
    "one token, default levels": (L((1,)), 16, 1, True, {"block_size": 8, "topk": 3, "levels": None}),
    "two rows": (L((2, 12)), 16, 2, True, {"block_size": 2, "topk": 2, "levels": 2}),
    "narrow in 3-D": (L((3, 3, 5)), 16, 1, False, {"block_size": 4, "topk": 2, "levels": 3}),
}
TYPED = [(case, dtype) for case in CASES for dtype in DTYPES]
PADDED = (
    "whole, 3 levels", "2-D, text", "3-D, text before", "3-D, long head", "1-D, text after", "1 level", "large blocks",
    "not enriched, text", "tiny",
)  # fmt: skip
padding = pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])


def properties(case, dtype):
    """Properties of a case: axes, levels, pooled values, padding of the head dim, heads, global tokens, and dtype."""
    layout, dim, heads, _, options = CASES[case]
    levels = min(options["levels"] or 1, 3)
    enrich, lanes = options.get("enrich", True), dim & (dim - 1) == 0
    return len(layout.grid), levels, enrich, lanes, heads, layout.before + layout.after > 0, dtype


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill torch.empty with NaN, so that unwritten outputs and reads of uninitialized memory show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case, dtype=torch.float32, padded=False, one_head=False):
    """Tensors (B, H, S, D) and the mask. The second of two elements has gaps and an interval of padding or, without
    global tokens, no valid token; masked rows are NaN."""
    layout, dim, heads, tokens_first, options = CASES[case]
    batch, heads = 1 + padded, 1 if one_head else heads
    shape = (batch, layout.seq_len, heads, dim) if tokens_first else (batch, heads, layout.seq_len, dim)
    qkv = [torch.randn(shape).to(DEVICE, dtype) for _ in range(3)]
    qkv = [x.transpose(1, 2) if tokens_first else x for x in qkv]
    key_mask = None
    if padded:
        key_mask = (torch.rand(batch, layout.seq_len) < 0.7).to(DEVICE)
        key_mask[0, layout.seq_len // 2 :] &= layout.seq_len < 9
        key_mask[1] &= layout.seq_len > layout.grid_len
        for x in qkv:
            x.masked_fill_(~key_mask[:, None, :, None], torch.nan)
    return qkv, layout, key_mask, options


def tree_of(layout, options):
    tree = make_tree(layout.grid, options["block_size"], options["levels"], torch.device(DEVICE))
    return [level.children for level in tree], [level.place for level in tree]


def covered_by_level(layout, options, key_mask, b):
    """Tokens covered by each pooled token, level 1 first; valid ones only."""
    covered = llsa._covered(layout, tile_shapes(layout.grid, options["block_size"], options["levels"]))
    return [[[t for t in node if key_mask is None or key_mask[b, t]] for node in level] for level in covered]


def means(x, levels):
    """Means (H, S, D) → (H, n, D) float64 for each level."""
    return [torch.stack([x[:, t].double().sum(1) / max(1, len(t)) for t in level], 1) for level in levels[1:]]


@pytest.mark.parametrize(
    "case, dtype, padded",
    sweep.cover(
        itertools.product(["2-D, text", "3-D, text before"], [torch.float32, torch.bfloat16], [False, True]),
        lambda *case: case,
    ),
    ids=str,
)
def test_pooled_tokens_are_means_of_valid_tokens(case, dtype, padded):
    (query, key, value), layout, key_mask, options = inputs(case, dtype, padded)
    pooled = pool_tree(query, key, value, tree_of(layout, options)[0], layout.before, key_mask)
    assert len(pooled.number) == (len(query) if padded else 1)
    for b in range(len(query)):
        levels = covered_by_level(layout, options, key_mask, b)
        for found, x in ((pooled.query, query), (pooled.key, key)):
            for mean, exact in zip(found, means(x[b], levels), strict=True):
                torch.testing.assert_close(mean[b].double(), exact, atol=4e-7, rtol=0)
        for every, x in ((pooled.all_keys, key), (pooled.all_values, value)):
            exact = torch.cat([*means(x[b], levels), torch.zeros_like(x[b, :, :1]).double()], 1)
            bound = max(4e-7, 2 * torch.finfo(dtype).eps)
            torch.testing.assert_close(every.unflatten(0, x.shape[:2])[b].double(), exact, atol=bound, rtol=bound)
        counts = torch.tensor([len(t) for level in levels[1:] for t in level] + [0.0], device=DEVICE)
        assert torch.equal(pooled.number[b if padded else 0], counts)
        torch.testing.assert_close(pooled.weight[b if padded else 0], counts.log2())


def test_without_values_only_queries_and_keys_are_pooled():
    (query, key, value), layout, _, options = inputs("2-D, text")
    children = tree_of(layout, options)[0]
    alone, whole = (pool_tree(query, key, v, children, layout.before) for v in (None, value))
    assert alone.all_keys is None and alone.all_values is None
    assert all(torch.equal(x, y) for x, y in zip(alone.query + alone.key, whole.query + whole.key, strict=True))


def check_selection(case, padded):
    """Compare the selection with that of the reference, on means in float64."""
    (query, key, value), layout, key_mask, options = inputs(case, padded=padded)
    children, places = tree_of(layout, options)
    pooled = pool_tree(query, key, value, children, layout.before, key_mask)
    (kept, *_), indices = select_tree(pooled, children, places, options["topk"])
    n_all, top = pooled.number.shape[1] - 1, pooled.rows[-1]
    assert kept.dtype == torch.int32 and kept.shape[:2] == (query[:, :, 0, 0].numel(), len(children[0]))
    for g in range(len(kept)):
        b, h = divmod(g, query.shape[1])
        inside = covered_by_level(layout, options, key_mask, b)
        columns = [(l, i) for l in range(1, len(inside)) for i in range(len(inside[l]))]
        covered = llsa._covered(layout, tile_shapes(layout.grid, options["block_size"], options["levels"]))
        q, k = (torch.cat(means(x[b], inside), 1)[h] for x in (query, key))
        choices = llsa._choices(q, k, columns, inside, covered, options["topk"])
        owner = {t: i for i, node in enumerate(covered[2]) for t in node} if len(covered) > 2 else {}
        for i, (tokens, fine, visible) in enumerate(choices):
            if not inside[1][i]:  # the selection is undefined for a block that is all padding
                continue
            own = [j for j in kept[g, i].tolist() if j >= 0]
            assert len(set(own)) == len(own)
            assert sorted(t for j in own for t in inside[1][j]) == sorted(fine)
            listed = [j for j in indices[g, owner[tokens[0]]].tolist() if j < n_all] if indices is not None else []
            listed += [top + j for j, node in enumerate(inside[-1]) if node]
            assert sorted(listed) == sorted(visible)


@pytest.mark.parametrize(
    "case, padded",
    sweep.keep(
        itertools.product(
            ["whole, 2 levels", "2-D, text", "3-D, text before", "1-D, text after", "1 level"], [False, True]
        ),
        lambda case: case[1] == (case[0] != "whole, 2 levels"),
    ),
)
def test_blocks_keep_what_the_reference_keeps(case, padded):
    check_selection(case, padded)


def test_many_candidates_are_scored_one_block_at_a_time(monkeypatch):
    monkeypatch.setattr(llsa_select_triton, "MAX_TILE", 16)
    check_selection("whole, uneven lists", True)


@pytest.mark.parametrize("grid", [(2, 12), (3, 3, 5), (4, 9), (1, 7), (2, 2, 6)])
def test_index_tables_of_a_tree_are_contiguous(grid):
    """Kernels do not read the strides of tables."""
    for block in (2, 3, 4, 6, 9, 10):
        for level in make_tree(grid, block, 3, torch.device("cpu")):
            assert level.children.is_contiguous() and level.place.is_contiguous()


def test_strided_index_tables_are_refused():
    (query, key, value), layout, _, options = inputs("2-D, text")
    children, places = tree_of(layout, options)
    pooled = pool_tree(query, key, None, children, layout.before)
    (kept, *_), _ = select_tree(pooled, children, places, 3, False)

    def strided(x):
        return x.mT.contiguous().mT

    common = {"scale": 0.1, "before": layout.before, "n_grid": layout.grid_len}
    wrong = [children[0], strided(children[1]), *children[2:]]
    with pytest.raises(ValueError, match=r"children\[1\] must be contiguous, got shape .* pass \.contiguous\(\)"):
        pool_tree(query, key, None, wrong, layout.before)
    with pytest.raises(ValueError, match=r"children\[1\] must be contiguous"):
        select_tree(pooled, wrong, places, 3, False)
    with pytest.raises(ValueError, match=r"children\[1\] must be contiguous"):
        llsa_blocks_attention(query, key, value, kept, wrong, **common)
    with pytest.raises(ValueError, match="kept must be contiguous"):
        llsa_blocks_attention(query, key, value, strided(kept), children, **common)


@padding
def test_large_top_level_is_selected_separately(monkeypatch, padded):
    monkeypatch.setattr(llsa_select_triton, "MAX_TILE", 1)
    check_selection("2-D, text", padded)


def test_too_many_candidates_are_an_error(monkeypatch):
    monkeypatch.setattr(llsa_select_triton, "MAX_CANDIDATES", 8)
    with pytest.raises(ValueError, match=r"hold 16 candidates.*make topk or block_size smaller"):
        check_selection("whole, uneven lists", False)


def exact(query, key, value, layout, key_mask, options):
    """Output of the reference in float64, and the log-sum-exp of its logits."""
    found = []

    def softmax_rows(logits, visible):
        found.append(logits.masked_fill(~visible, -torch.inf).logsumexp(-1))
        return plain(logits, visible)

    plain, llsa.softmax_rows = llsa.softmax_rows, softmax_rows
    try:
        # the reference pools queries by a product with zeros for padding, which would propagate NaN
        qkv = (x.double().cpu() for x in (query.nan_to_num(), key, value))
        out = llsa.reference(*qkv, layout, key_mask=None if key_mask is None else key_mask.cpu(), **options)
    finally:
        llsa.softmax_rows = plain
    return out.to(DEVICE), torch.stack(found).view(query.shape[:3]).to(DEVICE)


def check(case, dtype, padded):
    (query, key, value), layout, key_mask, options = inputs(case, dtype, padded, one_head=padded)
    given = AttentionInputs(query, key, value, key_mask, (), layout, query.shape[-1] ** -0.5)
    out, lse = LLSAAttnProcessor(**options).compute("triton", given)
    assert out.dtype == dtype and lse.dtype == torch.float32
    want, wanted_lse = exact(query, key, value, layout, key_mask, options)
    torch.use_deterministic_algorithms(False)
    plain = llsa_attention(query, key, value, layout, key_mask=key_mask, backend="torch", **options)
    rows = torch.ones_like(lse, dtype=torch.bool) if key_mask is None else key_mask[:, None].expand(lse.shape)
    error, plain_error = ((x.double() - want)[rows].norm() for x in (out, plain))
    assert error <= 2 * plain_error + torch.finfo(dtype).eps / 8 * want[rows].norm()
    torch.testing.assert_close(lse.double()[rows], wanted_lse[rows], atol=2e-6 + torch.finfo(dtype).eps, rtol=2e-6)
    return out, lse, rows


@pytest.mark.parametrize("case, dtype", sweep.cover(TYPED, properties), ids=str)
def test_agrees_with_the_reference(case, dtype):
    out, lse, _ = check(case, dtype, False)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize(
    "case, dtype", sweep.cover([x for x in TYPED if x[0] in PADDED], properties, each=False), ids=str
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_padding_is_masked_and_not_counted(case, dtype):
    """Padding is NaN and does not change the rows of valid queries."""
    check(case, dtype, True)


@pytest.mark.parametrize("case", ["3-D, text before", "1 level"])
def test_fully_padded_element_is_zero(case):
    (query, key, value), layout, key_mask, options = inputs(case, torch.float16, True)
    key_mask[1] = False
    query, key, value = (x.nan_to_num() for x in (query, key, value))
    given = AttentionInputs(query, key, value, key_mask, (), layout, 0.1)
    out, lse = LLSAAttnProcessor(**options).compute("triton", given)
    assert not out[1].any() and (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all() and lse[0].isfinite().all()


def gradients(tensors, grad, layout, key_mask, options, backend):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = llsa_attention(*leaves, layout, key_mask=key_mask, backend=backend, **options)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(
    "case, dtype",
    sweep.cover([x for x in TYPED if x[0] != "larger than a tile of queries"], properties, each=False),
    ids=str,
)
def test_gradients_agree_with_the_torch_path(case, dtype):
    check_gradients(case, dtype, False)


@pytest.mark.parametrize(
    "case, dtype",
    sweep.keep(
        [x for x in TYPED if x[0] in ("2-D, text", "3-D, text before", "1 level")],
        lambda x: x in (("2-D, text", DTYPES[0]), ("3-D, text before", DTYPES[1])),
    ),
    ids=str,
)
def test_gradients_under_padding(case, dtype):
    """Masked keys have a gradient of 0 and are never read."""
    check_gradients(case, dtype, True)


def check_gradients(case, dtype, padded):
    tensors, layout, key_mask, options = inputs(case, dtype, padded, one_head=padded)
    grad = torch.randn(tensors[0].shape, device=DEVICE).to(dtype)
    plain = [x.nan_to_num() for x in tensors]
    if padded:  # the selection is undefined for blocks that are all padding
        grad = grad * key_mask[:, None, :, None]
    torch.use_deterministic_algorithms(False)
    exact = gradients([x.double() for x in plain], grad.double(), layout, key_mask, options, "torch")
    rough = gradients(plain, grad, layout, key_mask, options, "torch")
    torch.use_deterministic_algorithms(True)
    found = gradients([plain[0], *tensors[1:]], grad, layout, key_mask, options, "triton")
    dense = zip(
        dense_gradients(plain, grad, key_mask), dense_gradients(plain, grad, key_mask, torch.double), strict=True
    )
    bands = [(x.double() - y).norm() / y.norm() for x, y in dense]
    for x, y, z, band in zip(found, exact, rough, bands, strict=True):
        assert x.dtype == dtype and x.isfinite().all()
        size = y.norm() + grad.double().norm() * (y.norm() == 0)
        if dtype == torch.float32:
            assert (x.double() - y).norm() <= 4e-6 * size
        else:  # the torch path computes in float32, with smaller errors than a plain implementation in this dtype
            allowed = torch.maximum((z.double() - y).norm(), band.nan_to_num() * size)
            assert (x.double() - y).norm() <= 2 * allowed + torch.finfo(dtype).eps / 4 * size


def dense_gradients(tensors, grad, key_mask, dtype=None):
    """Gradients of dense attention over the same tokens, every step in one dtype."""
    query, key, value = leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    logits = (query @ key.mT) * query.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], torch.finfo(logits.dtype).min)
    return torch.autograd.grad(logits.softmax(-1) @ value, leaves, grad.to(query.dtype))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    (query, key, value), layout, _, options = inputs("whole, uneven lists")
    out = llsa_attention(query, key, value, layout, scale=scale, backend="triton", **options)
    want, _ = exact(query, key, value, layout, None, {**options, "scale": scale})
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


def test_large_logits_do_not_overflow():
    """Logits of kept keys exceed those of pooled ones by more than the exponents of float32."""
    (query, key, value), layout, _, options = inputs("whole, uneven lists")
    out = llsa_attention(query, key, value, layout, scale=30.0, backend="triton", **options)
    want, lse = exact(query, key, value, layout, None, {**options, "scale": 30.0})
    assert lse.max() > 200
    torch.testing.assert_close(out.double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("text", [0, 3])
def test_everything_kept_and_not_enriched_is_dense(text):
    layout = L((6, 7), text)
    query, key, value = (torch.randn(1, 1, layout.seq_len, 32, device=DEVICE) for _ in range(3))
    options = {"block_size": 4, "topk": 10**6, "levels": 2, "enrich": False}
    out = llsa_attention(query, key, value, layout, backend="triton", **options)
    want = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("block_q, block_k", [(16, 16), (32, 64), (128, 128)])
def test_tiles_of_any_size_give_the_same(block_q, block_k):
    (query, key, value), layout, _, options = inputs("3-D, text before")
    children, places = tree_of(layout, options)
    (kept, *_), _ = select_tree(pool_tree(query, key, None, children, layout.before), children, places, 3, False)
    config = LaunchConfig(block_q, block_k, 4, 1)
    common = {"scale": 0.1, "before": layout.before, "n_grid": layout.grid_len}
    out, lse = llsa_blocks_attention(query, key, value, kept, children, **common, coarse=config, fine=config)
    assert lse is None
    want, _ = exact(query, key, value, layout, None, {**options, "scale": 0.1, "enrich": False})
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype, dim, message", [(torch.float64, 64, "float64"), (torch.float16, 300, "300")])
def test_unsupported_inputs_name_what_is_supported(dtype, dim, message):
    x = torch.zeros(1, 1, 16, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        llsa_attention(x, x, x, L((4, 4)), backend="triton")


# only the shapes of tables matter; importing only the kernels is fast
BUILD = """
import sys, torch, offline_gpu
from kernels import launch
from kernels.block_sparse import backward as block_sparse_bwd_triton
from kernels.llsa import backward as llsa_bwd_triton
from kernels.llsa import forward as llsa_triton
from kernels.llsa import select as llsa_select_triton
from kernels.llsa import tree as llsa_tree_triton
from kernels.selection import select as block_select_triton
target, shared = sys.argv[1], int(sys.argv[2]) * 1024
llsa_triton.check_inputs = llsa_bwd_triton.check_inputs = lambda query: None
launch.shared_memory = lambda query: shared
if target.startswith("gfx"):
    torch.version.hip = "6"
built = []
class Launch:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *a, **k: built.append(self.kernel.warmup(*a, grid=grid, **k))
modules = [block_select_triton, block_sparse_bwd_triton, llsa_bwd_triton, llsa_select_triton, llsa_tree_triton]
for module in [*modules, llsa_triton]:
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Launch(getattr(module, name)))
variants = {  # head dim, tokens of each level, tokens ahead of the grid, padding
    "whole": (64, (4096, 256, 16), 0, False),
    "long head": (128, (4096, 256, 16), 0, False),
    "ragged": (128, (1500, 94, 6, 1), 8, True),
}
with offline_gpu.target(target):
    for name in sys.argv[3:]:
        dim, sizes, before, padded = variants[name]
        x = torch.empty(1, before + sizes[0], 2, dim, dtype=torch.bfloat16).transpose(1, 2)
        real = torch.ones(1, x.shape[2], dtype=torch.bool) if padded else None
        children = [torch.zeros(n, 16, dtype=torch.int64) for n in sizes[1:]]
        pool = llsa_tree_triton.pool_tree(x, x, x, children, before, real)
        places = [torch.zeros(n, dtype=torch.int64) for n in sizes]
        kept, met = llsa_select_triton.select_tree(pool, children, places, 8)
        pooled = llsa_triton.Pooled(pool.all_keys, pool.all_values, pool.weight, met, pool.rows[-1])
        llsa_triton.llsa_blocks_attention(
            x, x, x, kept[0], children, scale=0.1, before=before, n_grid=sizes[0], pooled=pooled, key_mask=real,
            whole=not padded, return_lse=True,
        )
        ends = torch.zeros(2, 1, dtype=torch.int32)
        llsa_bwd_triton.transpose_block_lists = lambda lists, n: (lists.flatten(1), ends.expand(-1, n + 1))
        llsa_bwd_triton.llsa_blocks_attention_backward(
            x, x, torch.empty(x.shape[:3]), x, x, x, kept, children, places, scale=0.1, before=before, n_grid=sizes[0],
            pooled=pooled, number=pool.number, rows=pool.rows, key_mask=real,
        )
print(len(built), max(each.metadata.shared for each in built) <= shared, sorted(built[-1].asm))
"""


@pytest.mark.parametrize(
    "target, shared, variants",
    sweep.keep(
        [
            ("sm_80", 163, ["ragged"]),
            ("sm_89", 99, ["ragged"]),
            ("sm_90", 227, ["long head"]),
            ("sm_100", 227, ["whole"]),
            ("gfx942", 64, ["ragged"]),
        ],
        lambda x: x[0] in ("sm_89", "gfx942"),  # small shared memory, AMD
    ),
)
def test_kernels_build_for(target, shared, variants):
    """Kernels build and fit the shared memory. In a separate process, because kernels are interpreted in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", BUILD, target, str(shared), *variants]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    n_kernels = sum(16 if name == "ragged" else 12 for name in variants)
    assert done.stdout.startswith(f"{n_kernels} True")
    assert ("hsaco" if target.startswith("gfx") else "cubin") in done.stdout


def test_float16_keeps_large_sums():
    """Means are computed from float32 sums: 64 values of 6,000 do not overflow."""
    layout, options = L((16, 16)), {"block_size": 16, "topk": 2, "levels": 2}
    query, key = (torch.randn(1, 1, layout.seq_len, 16, device=DEVICE).half() for _ in range(2))
    value = torch.full_like(key, 6000)
    out = llsa_attention(query, key, value, layout, backend="triton", **options)
    assert math.isclose(out.min().item(), 6000, rel_tol=2e-3) and math.isclose(out.max().item(), 6000, rel_tol=2e-3)
