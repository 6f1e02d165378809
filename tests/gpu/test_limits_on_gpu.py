"""The kernels at their limits: tensors of more than 2**31 elements, full memory, the largest heads, changing sizes
under torch.compile, and a head dim without a table entry."""

import itertools
import json
import math
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel import TokenLayout, functional
from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse import forward as block_sparse_triton
from dit_accel.mechanisms.gna import _is_visible

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HEADS, DIM, BLOCK = 24, 128, 64
MOST_BYTES = 70e9
OPTIONS = {
    "gna": {"window": (3, 16, 16), "stride": (1, 4, 8)},
    "clear": {"radius": 8.0},
    "sla": {"critical": 0.002, "block_q": 128, "block_kv": BLOCK},
}
GRIDS = {"gna": (11, 256, 256), "clear": (704, 1024), "sla": (704, 1024)}  # 720,896 tokens each
HALF_GRIDS = {"gna": (11, 128, 256), "clear": (352, 1024), "sla": (352, 1024)}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL_BACKEND", raising=False)
    monkeypatch.setenv("DIT_ACCEL_AUTOTUNE", "0")
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


def call(name, tensors, layout, mask=None, **options):
    return getattr(functional, f"{name}_attention")(*tensors, layout, key_mask=mask, **options)


def make(arrangement, length, batch, device, dtype):
    """Random (B, H, S, D), with heads or tokens first in memory."""
    if arrangement == "heads first":
        return torch.randn(batch, HEADS, length, DIM, device=device, dtype=dtype)
    return torch.randn(batch, length, HEADS, DIM, device=device, dtype=dtype).transpose(1, 2)


def window_keys(name, place, grid):
    """Grid rows visible to the token at this position."""
    if name == "gna":
        options = zip(OPTIONS["gna"]["window"], OPTIONS["gna"]["stride"], strict=True)
        along = [
            [y for y in range(n) if _is_visible(x, y, n, window, stride, 1, False)]
            for x, n, (window, stride) in zip(place, grid, options, strict=True)
        ]
        visible = itertools.product(*along)
    else:
        radius = OPTIONS["clear"]["radius"]
        along = [range(max(0, x - int(radius)), min(n, x + int(radius) + 1)) for x, n in zip(place, grid, strict=True)]
        visible = (y for y in itertools.product(*along) if math.dist(place, y) < radius)
    steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    return [sum(x * step for x, step in zip(y, steps, strict=True)) for y in visible]


def pooled(x, key_mask):
    """Means (M, D) over the valid tokens of each block of (N, D); key_mask (N,)."""
    weights = key_mask.float().view(-1, BLOCK, 1)
    return (x.float().view(-1, BLOCK, x.shape[1]) * weights).sum(1) / weights.sum(1).clamp(min=1)


def block_keys(query, key, layout, token, key_mask):
    """Grid rows selected by the block of this grid token, per head, or None if rounding may decide."""
    block_q = OPTIONS["sla"]["block_q"]
    first = token // block_q * block_q
    queries = torch.arange(first, min(first + block_q, layout.grid_len), device=query.device) + layout.before
    queries = queries[key_mask[queries]]
    found = []
    for q, k in zip(query, key, strict=True):
        scores = (pooled(k[layout.grid_slice], key_mask[layout.grid_slice]) * q[queries].float().mean(0)).sum(1)
        n = max(1, int(OPTIONS["sla"]["critical"] * len(scores)))
        best = scores.topk(n + 1)
        sure = best.values[n - 1] - best.values[n] > 1e-4 * best.values[0]
        tokens = best.indices[:n, None] * BLOCK + torch.arange(BLOCK, device=key.device)
        found.append(tokens.flatten() if sure else None)
    return found


def attend(q, k, v, rows):
    """Softmax attention of one query (D,) over some rows, in float32."""
    keys, values = k[rows].float(), v[rows].float()
    return torch.softmax((keys * q.float()).sum(1) * DIM**-0.5, 0) @ values


def check(name, layout, tensors, mask, out, tolerance):
    """Compare rows of the last batch element with float32: first, last and some near the end, on the grid and
    global."""
    query, key, value = (x[-1] for x in tensors)
    key_mask = torch.ones(layout.seq_len, dtype=torch.bool, device=query.device) if mask is None else mask[-1]
    off_grid = [*range(layout.before), *range(layout.grid_slice.stop, layout.seq_len)]
    near_end = torch.randint(layout.grid_len * 49 // 50, layout.grid_len, (3,)).tolist()
    tokens = [0, layout.grid_len // 2 + 3, *near_end, layout.grid_len - 1]
    compared = 0
    for row in [*(layout.before + token for token in tokens), off_grid[0], off_grid[-1]]:
        if row in off_grid:
            keys = [torch.arange(layout.seq_len)] * HEADS
        elif name == "sla":
            keys = block_keys(query, key, layout, row - layout.before, key_mask)
        else:
            keys = [torch.tensor(window_keys(name, layout.coordinates(row), layout.grid))] * HEADS
        for h, visible in enumerate(keys):
            if visible is None:
                continue
            visible = visible.to(query.device)
            if row not in off_grid:
                visible = torch.cat([visible + layout.before, torch.tensor(off_grid, device=query.device)])
            want = attend(query[h, row], key[h], value[h], visible[key_mask[visible]])
            assert (out[-1, h, row].float() - want).norm() <= tolerance * want.norm(), (row, h)
            compared += 1
    assert compared > 0.8 * HEADS * (len(tokens) + 2)


@pytest.mark.parametrize("kernel", ["the GPU's own", "portable", "portable, masked"])
@pytest.mark.parametrize("arrangement", ["tokens first", "heads first", "two of a batch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_more_elements_than_int32_counts(name, arrangement, kernel, monkeypatch):
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    if kernel == "portable":
        monkeypatch.setattr(block_sparse_triton, "_hopper", lambda device: None)
    batch = 2 if arrangement == "two of a batch" else 1
    layout = TokenLayout((GRIDS if batch == 1 else HALF_GRIDS)[name], 5, 3)
    tensors = [make(arrangement, layout.seq_len, batch, "cuda", torch.bfloat16) for _ in range(3)]
    assert tensors[0].numel() > 2**31
    mask = torch.rand(batch, layout.seq_len, device="cuda") > 0.2 if kernel == "portable, masked" else None
    out = call(name, tensors, layout, mask, **OPTIONS[name])
    check(name, layout, tensors, mask, out, 1e-2)
    assert torch.cuda.max_memory_allocated() < MOST_BYTES


@pytest.mark.parametrize("name", OPTIONS)
def test_out_of_memory_is_explained_and_recoverable(name):
    layout = TokenLayout((2, 128, 128) if name == "gna" else (128, 256))
    x = torch.randn(1, layout.seq_len, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)  # 201 MB
    options = {**OPTIONS[name], **({"window": (2, 16, 16)} if name == "gna" else {})}
    expected = call(name, [x, x, x], layout, **options)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - 2**27, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        call(name, [x, x, x], layout, **options)
    message = str(caught.value)
    assert message.startswith(f"{name} (backend triton) ran out of memory on cuda:0")
    assert f"(1, {HEADS}, {layout.seq_len}, {DIM}) in bfloat16" in message and "Tried to allocate" in message
    del hog, caught
    torch.cuda.empty_cache()
    assert torch.equal(call(name, [x, x, x], layout, **options), expected)


@pytest.mark.parametrize("linear_over", ["marginal", "all"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_largest_heads_with_a_projection(dtype, tolerance, linear_over):
    layout, options = TokenLayout((40, 56), 5, 3), {"critical": 0.1, "linear_over": linear_over}
    q, k, v = (torch.randn(1, 2, layout.seq_len, 256, device="cuda", dtype=dtype) for _ in range(3))
    weight = (torch.randn(256, 256, device="cuda") / 16).to(dtype)
    exact = call("sla", [q, k, v], layout, weight=weight, backend="torch", **options)
    out = call("sla", [q, k, v], layout, weight=weight, **options)
    assert (out.double() - exact.double()).norm() <= tolerance * exact.double().norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_changing_sizes_recompile_at_most_once(name):
    torch._dynamo.reset()
    options = {**OPTIONS[name], **({"window": (7, 8), "stride": (2, 4)} if name == "gna" else {})}
    counter = CompileCounterWithBackend("inductor")

    def attention(q, k, v, grid):
        return call(name, [q, k, v], TokenLayout(grid, 5, 3), **options)

    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for grid in ((40, 56), (48, 33), (21, 64)):
        shape = (2, 4, math.prod(grid) + 8, DIM)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        assert torch.equal(compiled(*qkv, grid), attention(*qkv, grid))
        counts.append(counter.frame_count)
    assert counts[-1] <= counts[0] + 1
    torch._dynamo.reset()


def test_unlisted_head_dim_is_tuned_once_and_cached(monkeypatch, tmp_path, caplog):
    layout, options = TokenLayout((64, 80), 5, 3), {"window": (16, 16), "stride": (4, 8)}
    qkv = [torch.randn(1, 8, layout.seq_len, 96, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    untuned = call("gna", qkv, layout, **options)
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path))
    monkeypatch.setenv("DIT_ACCEL_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_chosen", {})
    start = time.perf_counter()
    out = call("gna", qkv, layout, **options)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < tuning.BUDGET_S + 20  # a way that was begun is ended
    first, second = messages = [record.getMessage() for record in caplog.records if record.name == "dit_accel"]
    print(*messages, sep="\n")
    assert "DIT_ACCEL_AUTOTUNE=0" in first and "head dim 96" in first and "fastest: " in second
    assert (out.double() - untuned.double()).norm() <= 1e-2 * untuned.double().norm()
    (key,) = json.loads((tmp_path / "tuning.json").read_text())
    assert torch.cuda.get_device_name() in key
    assert torch.equal(call("gna", qkv, layout, **options), out)
    monkeypatch.setattr(tuning, "_chosen", {})  # as in a new process
    assert torch.equal(call("gna", qkv, layout, **options), out)
    assert [record.getMessage() for record in caplog.records if record.name == "dit_accel"] == messages
