"""Gradients of the four functions, with learned tensors, global tokens and padding."""

from __future__ import annotations

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.mechanisms import clear, gna, llsa, sla

LAYOUT = TokenLayout((3, 5), 2, 1)
CASES = [
    (gna.gna_attention, gna.reference, {"window": 3, "stride": 2}, {}),
    (gna.gna_attention, gna.reference, {"window": (1, 2), "dilation": (1, 2), "is_causal": (False, True)}, {}),
    (clear.clear_attention, clear.reference, {"radius": 1.8}, {}),
    (clear.clear_attention, clear.reference, {"radius": 1.2, "down_factor": 2}, {"pool_weight": (2, 2)}),
    (
        sla.sla_attention,
        sla.reference,
        {"block_q": 4, "block_kv": 3, "critical": 0.4, "negligible": 0.2},
        {"weight": (4, 4), "bias": (4,)},
    ),
    (
        sla.sla_attention,
        sla.reference,
        {"block_q": 4, "block_kv": 3, "critical": 0.4, "linear_over": "all", "feature_map": "elu", "tile_order": True},
        {"weight": (4, 4)},
    ),
    (llsa.llsa_attention, llsa.reference, {"block_size": 4, "topk": 2}, {}),
    (llsa.llsa_attention, llsa.reference, {"block_size": 2, "topk": 1, "levels": 2}, {}),
    (llsa.llsa_attention, llsa.reference, {"block_size": 4, "topk": 2, "enrich": False}, {}),
]


FORWARD_MODES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda t: f(t * x))(torch.ones((), dtype=x.dtype)),
    "compiled": lambda f, x: torch.func.jvp(torch.compile(f, backend="aot_eager"), (x,), (torch.ones_like(x),)),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("function, reference, options, learned", [CASES[0], CASES[3], CASES[4], CASES[6]])
def test_forward_mode_is_refused(function, reference, options, learned, mode):
    """Tangents of any argument are refused: torch would return a derivative of 0."""
    tensors = [x.detach() for x in make([(1, 1, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))]
    attend = call(function, options, list(learned), None)
    places = range(len(tensors)) if mode == "jvp" else [0]
    for i in places:
        with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative .* use reverse mode"):
            FORWARD_MODES[mode](lambda x, i=i: attend(*tensors[:i], x, *tensors[i + 1 :]), tensors[i])


def test_tensors_without_tangents_are_taken_in_forward_mode():
    q, k, v = (x.detach() for x in make([(1, 1, LAYOUT.seq_len, 4)] * 3))
    out = gna.gna_attention(q, k, v, LAYOUT, window=3)
    value, tangent = torch.func.jvp(lambda t: t * gna.gna_attention(q, k, v, LAYOUT, window=3), (out,), (out,))
    torch.testing.assert_close(tangent, value)


def make(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def call(function, options, names, mask):
    return lambda q, k, v, *more: function(
        q, k, v, LAYOUT, **options, **dict(zip(names, more, strict=True)), key_mask=mask
    )


def holes():
    mask = torch.ones(2, LAYOUT.seq_len, dtype=torch.bool)
    mask[0, [1, 4, 9]] = False
    mask[1] = False  # rows without a visible key
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function, reference, options, learned", CASES)
def test_gradcheck(function, reference, options, learned, masked):
    tensors = make([(2, 2, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))
    attend = call(function, options, list(learned), holes() if masked else None)
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@pytest.mark.parametrize("function, reference, options, learned", CASES)
def test_same_gradients_as_the_reference(function, reference, options, learned):
    tensors = make([(2, 2, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))
    upstream = torch.randn(2, 2, LAYOUT.seq_len, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    got, want = (
        torch.autograd.grad((call(f, options, list(learned), None)(*tensors) * upstream).sum(), tensors)
        for f in (function, reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function, reference, options, learned", CASES)
def test_garbage_in_padding_does_not_leak(function, reference, options, learned):
    """NaN in masked keys and values, and an element that is all padding, give zeros and finite gradients."""
    tensors = make([(2, 2, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))
    mask = holes()
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty[1:3]:
        x[(~mask)[:, None].expand(2, 2, -1)] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    attend = call(function, options, list(learned), mask)
    clean_out, out = attend(*tensors), attend(*dirty)
    assert torch.equal(out, clean_out)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    grads = torch.autograd.grad(out.square().sum(), dirty)
    for grad in grads:
        assert torch.isfinite(grad).all()
    for grad in grads[:3]:
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))


@pytest.mark.parametrize("chunk", [1, 4000])
@pytest.mark.parametrize("function, reference, options, learned", CASES)
def test_chunks_do_not_matter(function, reference, options, learned, chunk, monkeypatch):
    tensors = make([(2, 2, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))
    attend = call(function, options, list(learned), holes())
    whole = attend(*tensors)
    grads = torch.autograd.grad(whole.square().sum(), tensors)
    monkeypatch.setattr("dit_accel.kernels.block_sparse.reference.CHUNK_BYTES", chunk)
    cut = attend(*tensors)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(torch.autograd.grad(cut.square().sum(), tensors), grads)


@pytest.mark.parametrize("function, reference, options, learned", CASES[3:5])
def test_bfloat16_gradients(function, reference, options, learned):
    tensors = [
        x.detach().bfloat16().requires_grad_() for x in make([(2, 2, LAYOUT.seq_len, 4)] * 3 + list(learned.values()))
    ]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grads, wanted = (
        torch.autograd.grad(call(function, options, list(learned), None)(*x).sum(), x) for x in (tensors, exact)
    )
    for x, grad, want in zip(tensors, grads, wanted, strict=True):
        assert grad.dtype == x.dtype
        assert float((grad.double() - want).abs().max()) <= 0.02 * float(want.abs().max() + 1)
