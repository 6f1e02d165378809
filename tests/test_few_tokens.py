"""One to three tokens in one block: every mechanism in Triton's interpreter, and compiled offline, where a size of 1 is
specialized to a constant."""

import pytest
import torch
from test_triton_kernels import build

from dit_accel import TokenLayout, functional

BUILD = """
import importlib, pathlib, sys, torch, offline_gpu
import dit_accel.kernels
from dit_accel import TokenLayout
from dit_accel.mechanisms import clear, gna, llsa, sla
from dit_accel.mechanisms._inputs import AttentionInputs
built, empty = [], torch.empty
torch.empty = lambda *a, **k: empty(*a, **k).zero_()  # lists that no kernel has written are of block 0
def offline(kernel):
    class Launch:
        def __getitem__(self, grid):
            return lambda *a, **k: built.append(kernel.warmup(*a, grid=grid, **k))
    return Launch()
for path in pathlib.Path(list(dit_accel.kernels.__path__)[0]).glob("*/*.py"):
    if path.stem in ("forward", "backward", "pool", "select", "tree"):
        module = importlib.import_module(f"dit_accel.kernels.{path.parent.name}.{path.stem}")
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                setattr(module, name, offline(getattr(module, name)))
            elif name == "check_inputs":
                module.check_inputs = lambda query: None
def run(processor, *learned, n, before=0, heads=1, dim=16, key_mask=None):
    x = torch.zeros(1, heads, before + n, dim, dtype=torch.float16)
    inputs = AttentionInputs(x, x, x, key_mask, learned, TokenLayout((n,), before), 0.1)
    out, lse = processor.compute("triton", inputs)
    processor.backward(x, out, lse, inputs)
def call(name, **size):
    dim = size.get("dim", 16)
    weight = torch.zeros(dim, dim, dtype=torch.float16)
    if name.startswith("sla"):
        options = {"critical": 1.0, "negligible": 0.0, "feature_map": "relu", "linear_over": name.split()[1]}
        run(sla.SLAAttnProcessor(**options), weight, weight[0], **size)
    elif name == "llsa":
        run(llsa.LLSAAttnProcessor(block_size=2, topk=1, levels=2), **size)
    elif name == "gna":
        run(gna.GNAAttnProcessor(window=1), **size)
    else:
        run(clear.CLEARAttnProcessor(radius=1.0), None, **size)
with offline_gpu.target("sm_90"):
    for name in sys.argv[1:]:
        call(name, n=1)
        print(name, len(built), all("cubin" in each.asm for each in built))
        built.clear()
"""
BUILT = {"sla all": 18, "sla marginal": 18, "llsa": 16, "gna": 4, "clear": 4}  # kernels


@pytest.fixture(scope="module")
def reports():
    """Lines that one process printed: its imports take longer than a mechanism."""
    return build(BUILD, *BUILT).splitlines()


@pytest.mark.parametrize("name, n_kernels", BUILT.items())
def test_kernels_build_for_one_token(name, n_kernels, reports):
    assert f"{name} {n_kernels} True" in reports


CASES = {
    "sla all": ("sla", {"critical": 1.0, "negligible": 0.0, "linear_over": "all", "feature_map": "relu"}),
    "sla marginal": ("sla", {"critical": 0.5, "negligible": 0.0, "block_q": 2, "block_kv": 2, "feature_map": "elu"}),
    "llsa": ("llsa", {"block_size": 2, "topk": 1, "levels": 2}),
    "gna": ("gna", {"window": 1}),
    "clear": ("clear", {"radius": 2}),
}


def attend(name, options, layout, leaves, mask, backend):
    learned = {"weight": leaves[3], "bias": leaves[4]} if name == "sla" else {}
    function = getattr(functional, f"{name}_attention")
    return function(*leaves[:3], layout, key_mask=mask, backend=backend, **learned, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU")
@pytest.mark.parametrize("layout", [TokenLayout((1,)), TokenLayout((3,), 1, 0)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_few_tokens_agree_with_the_torch_path(case, layout):
    name, options = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, layout.seq_len, 5) for _ in range(3)] + [torch.randn(5, 5), torch.randn(5)]
    tensors, grad = tensors[: 5 if name == "sla" else 3], torch.randn(1, 1, layout.seq_len, 5)
    found = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attend(name, options, layout, leaves, None, backend)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for x, exact in zip(*found, strict=True):
        torch.testing.assert_close(x.double(), exact, atol=2e-6, rtol=2e-6)
