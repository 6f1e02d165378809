"""The torch path on a GPU: every function compared with float64, and an installed model compiled by Inductor."""

import pytest
import torch
import torch.nn.functional as F

import dit_accel
from dit_accel import TokenLayout
from dit_accel.mechanisms import clear, gna, llsa, sla

LAYOUT = TokenLayout((9, 13), before=5, after=3)
CASES = {
    "sla": (dit_accel.functional.sla_attention, sla.reference, {"critical": 0.3, "block_q": 16, "block_kv": 8}),
    "clear": (dit_accel.functional.clear_attention, clear.reference, {"radius": 3.5, "down_factor": 2}),
    "llsa": (dit_accel.functional.llsa_attention, llsa.reference, {"block_size": 4, "topk": 3}),
    "gna": (dit_accel.functional.gna_attention, gna.reference, {"window": (5, 7), "stride": (2, 3)}),
}


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_agree_with_float64(name, dtype):
    """The selection uses the same rounded inputs, so that only the arithmetic differs."""
    function, reference, options = CASES[name]
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, LAYOUT.seq_len, 64, device="cuda").to(dtype) for _ in range(4))
    exact_inputs = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference(*exact_inputs, LAYOUT, **options)
    exact_grads = torch.autograd.grad(exact, exact_inputs, g.double())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = function(*inputs, LAYOUT, **options)
    grads = torch.autograd.grad(out, inputs, g)
    dense = F.scaled_dot_product_attention(*inputs)
    dense_exact = F.scaled_dot_product_attention(*exact_inputs)
    band = 2 * error(dense.detach(), dense_exact.detach()) + 4 * torch.finfo(dtype).eps
    assert error(out.detach(), exact.detach()) <= band
    for mine, true in zip(grads, exact_grads, strict=True):
        assert error(mine, true) <= 4 * band


def test_flux_with_inductor_by_repeated_blocks():
    from tiny import TINY, run

    model = TINY["flux"]().cuda()
    inputs = {key: value.cuda() for key, value in TINY["flux"].inputs((7, 10)).items()}
    for processor in (
        dit_accel.SLAAttnProcessor(critical=0.3, block_q=16, block_kv=8),
        dit_accel.GNAAttnProcessor(window=3),
    ):
        model.set_attn_processor(processor)
        expected = run(model, inputs)
        compiled = TINY["flux"]().cuda()
        compiled.set_attn_processor(processor)
        compiled.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(run(compiled, inputs), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["model", "group block_level", "group leaf_level"])
def test_offloading_moves_learned_parameters(kind):
    from accelerate import cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading
    from tiny import TINY, run

    model, plain = TINY["flux"](), TINY["flux"]().cuda()
    inputs = {key: value.cuda() for key, value in TINY["flux"].inputs((7, 10)).items()}
    processor = dit_accel.SLAAttnProcessor(critical=0.3, block_q=16, block_kv=8)
    for each in (model, plain):
        each.set_attn_processor(processor)
    if kind == "model":
        cpu_offload_with_hook(model, "cuda")
    else:
        options = {"num_blocks_per_group": 1} if "block" in kind else {}
        apply_group_offloading(model, torch.device("cuda"), offload_type=kind.split()[1], **options)
    torch.testing.assert_close(run(model, inputs), run(plain, inputs), atol=1e-5, rtol=1e-5)
