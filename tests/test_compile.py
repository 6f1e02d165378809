"""torch.compile of installed models: whole or by repeated block, one graph, no recompilation between steps."""

import pytest
import sweep
import torch
from test_families import NARROW
from tiny import TINY, run
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel

# one mechanism per family suffices: the graph around the operator is the same for all
CASES = [
    ("flux", "sla"), ("flux", "gna"), ("sd3", "llsa"), ("sd15", "gna"), ("sdxl", "llsa"), ("wan", "clear"),
    ("wan_vace", "sla"),
]  # fmt: skip
# the cases of make test: each class of model once; two more tests compile Flux by blocks, test_linfusion SD 1.5
WHOLE = [("flux", "sla"), ("wan", "clear")]
BLOCKS = [("sdxl", "llsa")]
INDUCTOR = sweep.keep(
    [("flux", "clear"), ("sd3", "llsa"), ("sd15", "gna"), ("wan", "sla")],
    lambda case: case in [("flux", "clear"), ("sd15", "gna")],
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model, family, count=3):
    """Return the outputs of a few denoiser calls on different data of the same size."""
    torch.manual_seed(7)
    outputs = []
    for i in range(count):
        inputs = TINY[family].inputs(TINY[family].size)
        inputs["timestep"] = (
            inputs["timestep"] / (i + 1) if inputs["timestep"].is_floating_point() else inputs["timestep"] - i
        )
        outputs.append(run(model, inputs))
    return torch.stack(outputs)


@pytest.mark.parametrize(("family", "name"), sweep.keep(CASES, lambda case: case in WHOLE))
def test_whole_model_is_one_graph(family, name):
    model = TINY[family]()
    model.set_attn_processor(NARROW[name])
    expected = steps(model, family)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(steps(compiled, family), expected, atol=1e-5, rtol=1e-5)
    # Flux's grid is data, read by an operator before the model is traced: dynamo makes a separate graph of that hook
    assert counter.frame_count == (2 if family == "flux" else 1)
    assert all(hook.slot.layout is None for hook in model._dit_accel.hooks)
    assert 0 < dit_accel.logit_fraction(model) < 1 and "not run" not in dit_accel.describe(model)


def graphs_of_repeated_blocks(model, family):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    return steps(model, family), counter.frame_count


@pytest.mark.parametrize(
    ("family", "name"),
    sweep.keep([case for case in CASES if TINY[case[0]].block is not None], lambda case: case in BLOCKS),
)
def test_repeated_blocks_add_no_graphs(family, name):
    _, dense_graphs = graphs_of_repeated_blocks(TINY[family](), family)
    model = TINY[family]()
    model.set_attn_processor(NARROW[name])
    expected = steps(model, family)
    output, graphs = graphs_of_repeated_blocks(model, family)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert graphs == dense_graphs


@pytest.mark.parametrize(("family", "name"), INDUCTOR)
def test_inductor_keeps_the_output(family, name):
    model = TINY[family]()
    model.set_attn_processor(NARROW[name])
    expected = steps(model, family, 1)
    if TINY[family].block is not None:
        model.compile_repeated_blocks(fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(steps(compiled, family, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    sweep.keep([("flux", "gna"), ("wan", "llsa")], lambda case: case[0] == "flux"),
)
def test_denoiser_inside_a_compiled_function(family, name):
    """The hooks are traced into the graph, and Flux's grid is symbolic until the operator runs."""
    model = TINY[family]()
    model.set_attn_processor(NARROW[name])
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(inputs):
        return model(**inputs, return_dict=False)[0] * 2

    for size in (TINY[family].size, TINY[family].other_size):
        torch.manual_seed(9)
        inputs = TINY[family].inputs(size)
        with torch.no_grad():
            torch.testing.assert_close(step(inputs), 2 * run(model, inputs), atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


def test_compiled_flux_follows_grid_of_equal_length():
    model = TINY["flux"]()
    del model.transformer_blocks[1:], model.single_transformer_blocks[1:]  # half of the graph to compile again
    model.set_attn_processor(NARROW["gna"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((7, 10), (10, 7), (6, 6)):
        inputs = TINY["flux"].inputs(size)
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sweep.keep(NARROW, lambda name: name == "sla"))
def test_compiled_training_step_keeps_gradients(name):
    def gradients(compile_it):
        torch.manual_seed(8)
        model, inputs = TINY["flux"]().train(), TINY["flux"].inputs((7, 10))
        model.set_attn_processor(NARROW[name])
        model.enable_gradient_checkpointing()
        if compile_it:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {key.replace("_orig_mod.", ""): p.grad for key, p in model.named_parameters() if p.grad is not None}

    plain, compiled = gradients(False), gradients(True)
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], atol=1e-5, rtol=1e-4)


def test_dense_steps_need_repeated_block_compile():
    model = TINY["flux"]()
    processor = dit_accel.GNAAttnProcessor(window=3, dense_steps=1)
    model.set_attn_processor(processor)
    expected = steps(model, "flux")
    output, graphs = graphs_of_repeated_blocks(model, "flux")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert graphs == 2 * graphs_of_repeated_blocks(TINY["flux"](), "flux")[1]  # dense and windowed
    torch._dynamo.reset()
    model = TINY["flux"]()
    model.set_attn_processor(processor)
    with pytest.raises(Exception, match="compile_repeated_blocks"):
        steps(torch.compile(model, fullgraph=True, backend="aot_eager"), "flux")
