"""Gradients by the Triton kernels, in Triton's interpreter (tests/gpu has the GPU): against the torch path's in float64,
which test_functional_gradients.py holds against finite differences.
"""

import pytest
import torch
from test_triton_kernels import CASES, L, call

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3}
NAMES = [name for name in CASES if "zero scale" not in name]


def gradients(name, layout, tensors, options, mask, backend, grad):
    """Of query, key, value and the learned tensors; and how many there are."""
    learned = {"sla": ["weight", "bias"], "clear": ["pool_weight"] if "down_factor" in options else []}.get(name, [])
    leaves = [x.detach().requires_grad_() for x in tensors[: 3 + len(learned)]]
    from dit_accel import functional

    function = getattr(functional, f"{name}_attention")
    more = dict(zip(learned, leaves[3:], strict=True))
    out = function(*leaves[:3], layout, key_padding_mask=mask, backend=backend, **more, **options)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype, masked", [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("case", NAMES)
def test_gradients_agree_with_the_torch_path(case, dtype, masked):
    name, layout, dim, options = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.randn(2, layout.seq_len, 2, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    if name == "sla":
        tensors += [(torch.randn(dim, dim) / dim**0.5).to(dtype), torch.randn(dim).to(dtype)]
    if "down_factor" in options:
        f = options["down_factor"]
        tensors.append((torch.rand(f, f) / f**2).to(dtype))
    grad = torch.randn(2, 2, layout.seq_len, dim).to(dtype)
    mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    exact = gradients(name, layout, [x.double() for x in tensors], options, mask, "torch", grad.double())
    if masked:  # what is hidden is never read
        for x in tensors[1:3]:
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    found = gradients(name, layout, tensors, options, mask, "triton", grad)
    for x, y, of in zip(found, exact, ("query", "key", "value", "first learned", "second"), strict=False):
        assert x.shape == y.shape and x.dtype == dtype
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm(), of
