"""The functions are faster than dense attention, and their memory grows with the number of computed logits."""

from __future__ import annotations

import statistics
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel import TokenLayout
from dit_accel.functional import clear_attention, gna_attention, llsa_attention, sla_attention

pytestmark = pytest.mark.timing

LEARNED = {"weight": torch.randn(64, 64), "bias": torch.randn(64)}
FAST = {
    "gna window 20": (gna_attention, {"window": 20}),
    "gna window 16 stride 8": (gna_attention, {"window": 16, "stride": 8}),
    "clear radius 11.4": (clear_attention, {"radius": 11.4}),
    "sla": (sla_attention, {"critical": 0.1}),
    "sla with projection": (sla_attention, {"critical": 0.1, **LEARNED}),
    "sla in tiles": (sla_attention, {"critical": 0.1, "tile_order": True, **LEARNED}),
    "llsa": (llsa_attention, {}),
}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", FAST)
def test_faster_than_dense_at_4096_tokens(name):
    function, options = FAST[name]
    layout = TokenLayout((64, 64))
    q, k, v = (torch.randn(1, 8, 4096, 64) for _ in range(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads would measure the load of the machine
    pair = (lambda: function(q, k, v, layout, **options), lambda: F.scaled_dot_product_attention(q, k, v))
    for run in pair:
        run()
    times = [[seconds(run) for run in pair] for _ in range(5)]  # interleaved, so that other load affects both
    torch.set_num_threads(threads)
    ours, dense = (statistics.median(column) for column in zip(*times, strict=True))
    assert ours < dense, f"{name}: {ours:.3f} s, dense {dense:.3f} s"


class PeakMemory(TorchDispatchMode):
    """Peak bytes of all storages allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size) -> None:
        self.known.discard(key)
        self.live -= size


GROWING = {
    "gna": (gna_attention, {"window": 12}),
    "gna stride": (gna_attention, {"window": 16, "stride": 8}),
    "gna dilation": (gna_attention, {"window": 12, "dilation": 2}),
    "clear": (clear_attention, {"radius": 7.5}),
    "clear pooled": (clear_attention, {"radius": 6.5, "down_factor": 8}),
    "llsa": (llsa_attention, {"levels": 2}),
}


def peak(function, options, side, *, backward):
    layout = TokenLayout((side, side), 16)
    tensors = [torch.randn(1, 2, layout.seq_len, 32, requires_grad=backward) for _ in range(3)]
    with PeakMemory() as memory:
        out = function(*tensors, layout, **options)
        if backward:
            out.sum().backward()
    return memory.peak


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", GROWING)
def test_memory_grows_as_the_tokens_at_a_fixed_window(name, backward):
    """Four times the tokens take about four times the memory; (S, S) would take sixteen times."""
    function, options = GROWING[name]
    small, large = (peak(function, options, side, backward=backward) for side in (40, 80))
    assert large < 5 * small
    assert large < 4 * (80 * 80) ** 2 / 4  # a quarter of one float32 (S, S)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_sla_grows_as_its_critical_blocks(backward):
    few, many = (peak(sla_attention, {"critical": c}, 80, backward=backward) for c in (0.05, 0.1))
    assert many < 2.2 * few
    assert many < 4 * (80 * 80) ** 2 / 4
