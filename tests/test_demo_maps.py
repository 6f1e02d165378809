"""Attention maps of the page against the functions of the library."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import save_flux, save_sd, save_sd3, save_wan
from torch.overrides import TorchFunctionMode

from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor
from dit_accel.common.pipeline_loading import load_pipeline
from dit_accel.demo.ui import attention_maps as maps
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms import llsa, sla

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout((8, 12), before=5),
    TokenLayout((7, 9), after=3),
    TokenLayout((3, 5, 6), before=2, after=1),
    TokenLayout((4, 6, 6)),
]
PROCESSORS = {
    "clear": CLEARAttnProcessor(radius=2.5),
    "clear-pooled": CLEARAttnProcessor(radius=2, down_factor=2),
    "gna": GNAAttnProcessor(window=3, stride=2),
    "llsa": LLSAAttnProcessor(block_size=4, topk=2, levels=2),
    "llsa-fine": LLSAAttnProcessor(block_size=4, topk=2, levels=2, enrich=False),
    "sla": SLAAttnProcessor(critical=0.2, negligible=0.3, block_q=8, block_kv=4),
    "sla-tiles": SLAAttnProcessor(critical=0.3, block_q=8, block_kv=8, tile_order=True, smooth_key=True),
}
POOLED = ("clear-pooled", "llsa")
cases = pytest.mark.parametrize("name", PROCESSORS)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def make_call(layout, heads=1, dim=16, scale=None, key_mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, layout.seq_len, dim, generator=generator) for _ in range(2))
    return maps.AttentionCall(query, key, layout, scale, key_mask)


def output(call, processor, value):
    return processor.attend(call.query, call.key, value, call.layout, key_mask=call.key_mask, host_scale=call.scale)


@cases
@layouts
def test_weights_reproduce_the_output(name, layout):
    call, processor = make_call(layout, scale=0.3), PROCESSORS[name]
    value = torch.randn(call.key.shape, generator=torch.Generator().manual_seed(1))
    token = layout.before + layout.grid_len // 2
    weights = maps.mechanism_weights(call, processor, token)
    torch.testing.assert_close(weights @ value[0, 0], output(call, processor, value)[0, 0, token])
    assert weights.sum() == pytest.approx(1)


@cases
@layouts
def test_output_depends_only_on_attended_tokens(name, layout):
    """Pooled tokens are disabled, as they depend on all tokens."""
    call, processor = make_call(layout), maps._without_pooling(PROCESSORS[name])
    token = layout.before + layout.grid_len - 3
    mask = maps.attended_mask(call, PROCESSORS[name], token)
    assert 0 < mask.sum() < layout.seq_len
    value = torch.zeros_like(call.key)
    value[0, 0, ~mask] = 1e6
    assert not output(call, processor, value)[0, 0, token].any()
    for other in mask.nonzero()[:, 0]:
        value = torch.zeros_like(call.key)
        value[0, 0, other] = 1
        assert output(call, processor, value)[0, 0, token].all()


@layouts
def test_global_tokens_are_always_attended(layout):
    for processor in PROCESSORS.values():
        mask = maps.attended_mask(make_call(layout), processor, layout.before)
        mask[layout.grid_slice] = True
        assert mask.all()


def test_clear_mask_is_a_circle():
    layout = TokenLayout((9, 11), before=4)
    mask = maps.attended_mask(make_call(layout), CLEARAttnProcessor(radius=3), layout.token((4, 5)))
    y, x = torch.meshgrid(torch.arange(9) - 4, torch.arange(11) - 5, indexing="ij")
    assert torch.equal(mask[layout.grid_slice].view(9, 11), y**2 + x**2 < 9)


def test_mask_contains_keys_with_vanishing_weight():
    layout = TokenLayout((6, 6))
    call = make_call(layout, scale=100.0)  # all weight on one key
    mask = maps.attended_mask(call, GNAAttnProcessor(window=3), layout.token((2, 2)))
    assert mask.sum() == 9 > (maps.mechanism_weights(call, GNAAttnProcessor(window=3), 14) > 0).sum()


@layouts
def test_dense_weights_are_softmax_over_all_keys(layout):
    call = make_call(layout, scale=0.5)
    value = torch.eye(layout.seq_len)[None, None]
    rows = F.scaled_dot_product_attention(call.query, call.key, value, scale=0.5)[0, 0]
    torch.testing.assert_close(maps.dense_weights(call, 7), rows[7])


@cases
@layouts
def test_shares_of_one_query_add_up(name, layout):
    call, token = make_call(layout), layout.before + 4
    found = maps.attend(call, PROCESSORS[name], token)
    assert found.dense.shape == found.weights.shape == found.mask.shape == layout.grid
    assert float(found.dense.sum()) + found.dense_global == pytest.approx(1, abs=1e-5)
    assert float(found.weights.sum()) + found.on_global == pytest.approx(1, abs=1e-5)
    assert found.coverage == pytest.approx(float(found.dense[found.mask].sum()) + found.dense_global, abs=1e-5)
    assert found.coverage < 1
    assert (found.pooled > 0.01) == (name in POOLED)


def test_pooled_share_is_the_weight_missing_on_fine_tokens():
    """Global tokens are not pooled, so their weights shrink by the share of the pooled tokens."""
    layout = TokenLayout((8, 8), before=6)
    call, processor = make_call(layout), PROCESSORS["clear-pooled"]
    with_pooled = maps.mechanism_weights(call, processor, 20)[:6]
    without = maps.mechanism_weights(call, maps._without_pooling(processor), 20)[:6]
    pooled = maps.attend(call, processor, 20).pooled
    torch.testing.assert_close(with_pooled / without, torch.full((6,), 1 - pooled))


def make_recording(call, layer="block", step=0):
    return maps.Recording((step,), (layer,), 1 << 30, {(step, layer): call})


@cases
@layouts
def test_layer_coverage_is_the_mean_over_queries_and_heads(name, layout, monkeypatch):
    monkeypatch.setattr(maps, "_MAX_SAMPLED_QUERIES", 6)
    call, processor = make_call(layout, heads=2), PROCESSORS[name]
    found = maps.coverage(make_recording(call), 0, "block", processor, CPU)
    tokens = [layout.before + i * layout.grid_len // 6 for i in range(6)]
    inspected = [maps.attend(call.head(head), processor, token) for head in range(2) for token in tokens]
    assert (found.n_queries, found.n_grid_tokens) == (6, layout.grid_len)
    assert found.mass == pytest.approx(sum(x.coverage for x in inspected) / len(inspected), abs=1e-5)
    assert found.on_global == pytest.approx(sum(x.dense_global for x in inspected) / len(inspected), abs=1e-5)


def test_full_window_covers_everything_but_padding():
    layout = TokenLayout((5, 6), before=4)
    key_mask = torch.ones(1, layout.seq_len, dtype=torch.bool)
    key_mask[0, 1:3] = False
    full = maps.coverage(
        make_recording(make_call(layout, key_mask=key_mask)), 0, "block", CLEARAttnProcessor(radius=99), CPU
    )
    assert full.mass == pytest.approx(1, abs=1e-5)
    assert maps.dense_weights(make_call(layout, key_mask=key_mask), 9)[1:3].sum() == 0


def test_coverage_samples_queries_of_large_grids(monkeypatch):
    call, processor = make_call(TokenLayout((12, 12))), PROCESSORS["clear"]
    whole = maps.coverage(make_recording(call), 0, "block", processor, CPU)
    monkeypatch.setattr(maps, "_MAX_SAMPLED_QUERIES", 36)
    some = maps.coverage(make_recording(call), 0, "block", processor, CPU)
    assert (some.n_queries, some.n_grid_tokens) == (36, 144)
    assert some.mass == pytest.approx(whole.mass, rel=0.2) and some.mass != whole.mass


@layouts
def test_sla_map_equals_the_selection(layout):
    for name in ("sla", "sla-tiles"):
        call, processor = make_call(layout), PROCESSORS[name]
        found = maps.block_map(call, processor)
        tables = [sla._blocks(layout, size, processor.tile_order, CPU)[0] for size in (8, processor.block_kv)]
        key_mask = torch.ones(1, layout.grid_len, dtype=torch.bool)
        indices, selected, marginal = sla._select(
            call.query,
            call.key,
            layout,
            *tables,
            key_mask,
            processor,
        )
        expected = marginal[0].int() * maps.LINEAR
        for row, blocks in enumerate(indices[0]):
            expected[row, blocks[selected[0]]] = maps.CRITICAL
        assert torch.equal(found.states, expected)
        assert set(found.states.unique().tolist()) == {maps.LEFT_OUT, maps.LINEAR, maps.CRITICAL}


@pytest.mark.parametrize("dim", [8, 64])
@layouts
def test_llsa_map_equals_the_selection(layout, dim):
    """Includes more blocks than value columns."""
    call, processor = make_call(layout, dim=dim), PROCESSORS["llsa"]
    found = maps.block_map(call, processor)
    tree = llsa.make_tree(layout.grid, 4, 2, CPU)
    key_mask = torch.ones(1, layout.grid_len, dtype=torch.bool)
    pools = [llsa._pool(x[:, :, layout.grid_slice], tree, key_mask) for x in (call.query, call.key)]
    selected, _ = llsa._select(*pools, tree, 2)
    expected = torch.zeros_like(found.states)
    for row, blocks in enumerate(selected[0]):
        expected[row, blocks[blocks >= 0]] = maps.CRITICAL
    assert torch.equal(found.states, expected)


@layouts
def test_map_agrees_with_the_attended_mask(layout):
    for name in ("sla", "sla-tiles", "llsa"):
        call, processor = make_call(layout), PROCESSORS[name]
        found = maps.block_map(call, processor)
        blocks = maps._block_of(processor.block_tables(layout)[1], layout.grid_len)
        for place in (0, layout.grid_len // 2, layout.grid_len - 1):
            mask = maps.attended_mask(call, processor, layout.before + place)[layout.grid_slice]
            row = found.states[found.query_block[place]] == maps.CRITICAL
            assert torch.equal(mask, row[blocks])


def test_no_map_for_windows_or_too_many_blocks(monkeypatch):
    call = make_call(LAYOUTS[0])
    assert maps.block_map(call, PROCESSORS["clear"]) is maps.block_map(call, PROCESSORS["gna"]) is None
    monkeypatch.setattr(maps, "_MAX_BLOCKS", 4)
    assert maps.block_map(call, PROCESSORS["sla"]) is None


def test_spread_steps_include_the_first_and_the_last():
    assert maps.spread_steps(10) == (0, 3, 6, 9)
    assert maps.spread_steps(3) == (0, 1, 2)
    assert maps.spread_steps(1) == (0,)


def draw(pipe, **options):
    sizes = {"num_frames": 5} if "Wan" in type(pipe).__name__ else {}
    return pipe(
        "a red circle", num_inference_steps=3, height=32, width=32, output_type="np",
        generator=torch.Generator().manual_seed(0), **sizes, **options,
    )[0]  # fmt: skip


def load(save, folder):
    return load_pipeline(str(save(folder / "pipe")), torch.float32, CPU)


@pytest.fixture(scope="module", params=[save_flux, save_wan, save_sd, save_sd3], ids=lambda save: save.__name__[5:])
def pipe(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny"))


def test_recording_does_not_change_the_output_or_processors(pipe):
    before = draw(pipe)
    processors = {name: id(module.processor) for name, module in _with_processor(pipe)}
    with maps.record_calls(pipe, (0, 2)) as recording:
        during = draw(pipe)
    assert (before == during).all()
    assert {name: id(module.processor) for name, module in _with_processor(pipe)} == processors
    assert {step for step, _ in recording.calls} == {0, 2}
    assert {layer for _, layer in recording.calls} == set(recording.layers)


def _with_processor(pipe):
    model = pipe.components.get("transformer") or pipe.components["unet"]
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "processor")]


class CaptureQueries(TorchFunctionMode):
    """Store the queries of each softmax call."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.queries.append((*args, *(kwargs or {}).values())[0].clone())
        return func(*args, **(kwargs or {}))


def test_recorded_queries_are_those_of_the_host(pipe):
    """The last sample of the batch, in the first of the calls with and without the prompt."""
    with CaptureQueries() as captured:
        draw(pipe)
    with maps.record_calls(pipe, (1,)) as recording:
        draw(pipe)
    for call in recording.calls.values():
        assert call.query.shape[0] == 1 and call.layout.seq_len == call.query.shape[2]
        assert any(torch.equal(query[-1:], call.query) for query in captured.queries)


def test_memory_limit_drops_steps_then_layers(tmp_path):
    pipe = load(save_flux, tmp_path)
    with maps.record_calls(pipe, (0, 1, 2)) as recording:
        draw(pipe)
    each = next(iter(recording.calls.values())).n_bytes
    layers = len(recording.layers)
    with maps.record_calls(pipe, (0, 1, 2), max_bytes=each * layers * 2) as fewer:
        draw(pipe)
    assert fewer.steps == (0, 2) and fewer.layers == recording.layers and len(fewer.calls) == 2 * layers
    with maps.record_calls(pipe, (0, 1, 2), max_bytes=each * 2) as fewest:
        draw(pipe)
    assert fewest.steps == (0,) and fewest.layers == (recording.layers[0], recording.layers[-1])
    assert fewest.n_bytes <= each * 2


def test_heads_are_inspected_independently():
    call = make_call(LAYOUTS[0], heads=3)
    one = call.head(2)
    assert torch.equal(one.query, call.query[:, 2:3])
    other = replace(call, query=call.query.flip(1), key=call.key.flip(1))
    assert torch.equal(maps.dense_weights(one, 9), maps.dense_weights(other.head(0), 9))
