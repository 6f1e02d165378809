"""The functions as torch operators: schema, fakes, autograd registration, autocast and torch.compile."""

from __future__ import annotations

import itertools

import pytest
import sweep
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dit_accel import PROCESSORS, TokenLayout, functional

W, B, P = torch.randn(16, 16), torch.randn(16), torch.rand(2, 2)
CASES = {
    "gna": ({"window": (3, 4), "stride": 2}, {}),
    "clear": ({"radius": (2.5, 3), "down_factor": 2}, {"pool_weight": P}),
    "sla": ({"block_q": 8, "block_kv": 8, "critical": 0.4}, {"weight": W, "bias": B}),
    "llsa": ({"block_size": 4, "topk": 2, "levels": 2}, {}),
}
ARGUMENTS = {
    "gna": ([3, 4], [2], [1], [False]),
    "clear": ([2.5, 3.0], 2, None),
    "sla": (0.4, 0.1, 8, 8, "softmax", "marginal", False, True),
    "llsa": (4, 2, 2, True),
}


def inputs(layout, dim=16, *, requires_grad=True, batch=2):
    return [torch.randn(batch, 2, layout.seq_len, dim, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize(
    "name, masked",
    # learned tensors and none, each with a mask and without
    sweep.keep(itertools.product(CASES, [False, True]), lambda x: x[1] == (x[0] in ("clear", "llsa"))),
)
def test_opcheck(name, masked):
    layout = TokenLayout((6, 7), 3, 2)
    mask = torch.rand(2, layout.seq_len) > 0.2 if masked else None
    learned = [x.clone().requires_grad_() for x in CASES[name][1].values()]
    arguments = (*inputs(layout), mask, *learned, [6, 7], 3, 2, *ARGUMENTS[name], None, False)
    operators = torch.ops.dit_accel
    torch.library.opcheck(getattr(operators, f"{name}_attention").default, arguments)
    tensors = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    grad = torch.randn_like(tensors[0])
    backward = getattr(operators, f"{name}_attention_backward").default
    torch.library.opcheck(backward, (grad, torch.randn_like(grad), torch.empty(0), *tensors))


@pytest.mark.parametrize("name", CASES)
def test_backward_leaves_its_arguments_alone(name):
    layout = TokenLayout((6, 7), 3, 2)
    arguments = [*(torch.randn(2, 2, layout.seq_len, 16) for _ in range(2)), torch.empty(0)]
    arguments += [*inputs(layout, requires_grad=False), None]
    arguments += [x.clone() for x in CASES[name][1].values()]
    before = [x if x is None else x.clone() for x in arguments]
    grads = getattr(torch.ops.dit_accel, f"{name}_attention_backward")(
        *arguments, [6, 7], 3, 2, *ARGUMENTS[name], None, False
    )
    for x, was in zip(arguments, before, strict=True):
        assert x is was or torch.equal(x, was)
    given = {x.data_ptr() for x in arguments if x is not None}
    assert len({x.data_ptr() for x in grads} - given) == len(grads)


def attend(name, layout):
    """The mechanism as an installed layer calls it."""
    options, learned = CASES[name]
    processor = PROCESSORS[name](**options)
    return lambda q, k, v, grid: processor.attend(
        q, k, v, TokenLayout(grid, layout.before, layout.after), parameters=learned
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_compile_fullgraph(name, backend):
    layout = TokenLayout((6, 7), 3, 2)
    function = attend(name, layout)
    qkv = inputs(layout)
    want = function(*qkv, layout.grid)
    wanted = torch.autograd.grad(want.square().sum(), qkv)
    got = torch.compile(function, backend=backend, fullgraph=True)(*qkv, layout.grid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), qkv), wanted)


@pytest.mark.parametrize("name", CASES)
def test_dynamic_sizes_compile_once(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = attend(name, TokenLayout((1,), 3, 2))
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for grid in ((6, 7), (5, 9), (8, 8)):
        qkv = inputs(TokenLayout(grid, 3, 2))
        torch.testing.assert_close(compiled(*qkv, grid), function(*qkv, grid))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3  # the first compilation may start over once, to make floats constants


@pytest.mark.parametrize("name", CASES)
def test_sizes_read_from_data(name):
    """Grid lengths that are unknown while tracing (``img_ids.max().item()``)."""
    torch._dynamo.reset()
    function = attend(name, TokenLayout((1,), 3, 2))

    def from_ids(q, k, v, ids):
        height, width = (ids.amax(0) + 1).tolist()
        return function(q, k, v, (height, width))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(from_ids, backend="aot_eager", fullgraph=True)
        qkv = inputs(TokenLayout((6, 7), 3, 2))
        for ids in ([[5, 6]], [[6, 5]]):
            torch.testing.assert_close(compiled(*qkv, torch.tensor(ids)), from_ids(*qkv, torch.tensor(ids)))


@pytest.mark.parametrize("name", CASES)
def test_learned_tensors_get_gradients_under_compile(name):
    options, learned = CASES[name]
    function = getattr(functional, f"{name}_attention")
    layout = TokenLayout((6, 7), 3, 2)
    learned = {key: x.clone().requires_grad_() for key, x in learned.items()}
    qkv = inputs(layout)
    leaves = [*qkv, *learned.values()]

    def loss(*tensors):
        named = dict(zip(learned, tensors[3:], strict=True))
        return function(*tensors[:3], layout, **options, **named).square().sum()

    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing_inside(name):
    options, learned = CASES[name]
    function = getattr(functional, f"{name}_attention")
    layout = TokenLayout((6, 7))
    qkv = inputs(layout, requires_grad=False)
    want = function(*qkv, layout, **options, **learned)
    with torch.autocast("cpu", torch.bfloat16):
        got = function(*qkv, layout, **options, **learned)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_train_after_inference_mode(name):
    """Plans and trees cached in inference mode are usable in training."""
    options, learned = CASES[name]
    function = getattr(functional, f"{name}_attention")
    layout = TokenLayout((9, 5), 1)
    qkv = inputs(layout)
    with torch.inference_mode():
        want = function(*qkv, layout, **options, **learned)
    got = function(*qkv, layout, **options, **learned)
    got.sum().backward()
    torch.testing.assert_close(got, want.clone())
    assert all(torch.isfinite(x.grad).all() for x in qkv)


@pytest.mark.parametrize("name", CASES)
def test_output_has_tokens_first_in_memory(name):
    options, learned = CASES[name]
    function = getattr(functional, f"{name}_attention")
    layout = TokenLayout((6, 7))
    out = function(*inputs(layout, requires_grad=False), layout, **options, **learned)
    assert out.transpose(1, 2).is_contiguous()
