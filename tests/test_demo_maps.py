"""What a place attends to, as the page shows it, is what the library's own functions compute."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import save_flux, save_sd, save_sd3, save_wan
from torch.overrides import TorchFunctionMode

from dit_accel.demo.ui import attention_maps as maps
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms import llsa, sla
from dit_accel.pipeline_loading import load_pipeline
from dit_accel.processor import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor

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


def a_call(layout, heads=1, dim=16, scale=None, real=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, layout.seq_len, dim, generator=generator) for _ in range(2))
    return maps.AttentionCall(query, key, layout, scale, real)


def output(call, processor, value):
    return processor.attend(call.query, call.key, value, call.layout, key_mask=call.real, host_scale=call.scale)


@cases
@layouts
def test_weights_are_those_of_the_output(name, layout):
    call, processor = a_call(layout, scale=0.3), PROCESSORS[name]
    value = torch.randn(call.key.shape, generator=torch.Generator().manual_seed(1))
    token = layout.before + layout.grid_len // 2
    weights = maps.mechanism_weights(call, processor, token)
    torch.testing.assert_close(weights @ value[0, 0], output(call, processor, value)[0, 0, token])
    assert weights.sum() == pytest.approx(1)


@cases
@layouts
def test_only_what_is_seen_changes_the_output(name, layout):
    """Without pooled tokens, in which everything has a part."""
    call, processor = a_call(layout), maps._plain(PROCESSORS[name])
    token = layout.before + layout.grid_len - 3
    seen = maps.visible(call, PROCESSORS[name], token)
    assert 0 < seen.sum() < layout.seq_len
    value = torch.zeros_like(call.key)
    value[0, 0, ~seen] = 1e6
    assert not output(call, processor, value)[0, 0, token].any()
    for other in seen.nonzero()[:, 0]:
        value = torch.zeros_like(call.key)
        value[0, 0, other] = 1
        assert output(call, processor, value)[0, 0, token].all()


@layouts
def test_text_is_always_seen(layout):
    for processor in PROCESSORS.values():
        seen = maps.visible(a_call(layout), processor, layout.before)
        seen[layout.grid_slice] = True
        assert seen.all()


def test_a_circle_is_seen():
    layout = TokenLayout((9, 11), before=4)
    seen = maps.visible(a_call(layout), CLEARAttnProcessor(radius=3), layout.token((4, 5)))
    y, x = torch.meshgrid(torch.arange(9) - 4, torch.arange(11) - 5, indexing="ij")
    assert torch.equal(seen[layout.grid_slice].view(9, 11), y**2 + x**2 < 9)


def test_what_is_seen_does_not_depend_on_how_small_its_weight_is():
    layout = TokenLayout((6, 6))
    call = a_call(layout, scale=100.0)  # all weight on one key
    seen = maps.visible(call, GNAAttnProcessor(window=3), layout.token((2, 2)))
    assert seen.sum() == 9 > (maps.mechanism_weights(call, GNAAttnProcessor(window=3), 14) > 0).sum()


@layouts
def test_dense_weights_are_softmax_over_everything(layout):
    call = a_call(layout, scale=0.5)
    value = torch.eye(layout.seq_len)[None, None]
    rows = F.scaled_dot_product_attention(call.query, call.key, value, scale=0.5)[0, 0]
    torch.testing.assert_close(maps.dense_weights(call, 7), rows[7])


@cases
@layouts
def test_a_place_is_told_in_shares(name, layout):
    call, token = a_call(layout), layout.before + 4
    found = maps.attend(call, PROCESSORS[name], token)
    assert found.dense.shape == found.weights.shape == found.seen.shape == layout.grid
    assert float(found.dense.sum()) + found.dense_text == pytest.approx(1, abs=1e-5)
    assert float(found.weights.sum()) + found.text == pytest.approx(1, abs=1e-5)
    assert found.caught == pytest.approx(float(found.dense[found.seen].sum()) + found.dense_text, abs=1e-5)
    assert found.caught < 1
    assert (found.pooled > 0.01) == (name in POOLED)


def test_share_of_pooled_tokens_is_what_the_fine_ones_lack():
    """Where no text is pooled, its weights shrink by as much as the pooled tokens take."""
    layout = TokenLayout((8, 8), before=6)
    call, processor = a_call(layout), PROCESSORS["clear-pooled"]
    with_pooled = maps.mechanism_weights(call, processor, 20)[:6]
    without = maps.mechanism_weights(call, maps._plain(processor), 20)[:6]
    pooled = maps.attend(call, processor, 20).pooled
    torch.testing.assert_close(with_pooled / without, torch.full((6,), 1 - pooled))


def a_recording(call, layer="block", step=0):
    return maps.Recording((step,), (layer,), 1 << 30, {(step, layer): call})


@cases
@layouts
def test_caught_mass_is_that_of_the_seen_tokens(name, layout, monkeypatch):
    monkeypatch.setattr(maps, "_SAMPLED", 6)
    call, processor = a_call(layout, heads=2), PROCESSORS[name]
    found = maps.caught(a_recording(call), 0, "block", processor, CPU)
    tokens = [layout.before + i * layout.grid_len // 6 for i in range(6)]
    places = [maps.attend(call.head(head), processor, token) for head in range(2) for token in tokens]
    assert (found.places, found.all_places) == (6, layout.grid_len)
    assert found.mass == pytest.approx(sum(x.caught for x in places) / len(places), abs=1e-5)
    assert found.text == pytest.approx(sum(x.dense_text for x in places) / len(places), abs=1e-5)


def test_caught_mass_of_a_full_window_is_all_and_padding_is_no_part_of_it():
    layout = TokenLayout((5, 6), before=4)
    real = torch.ones(1, layout.seq_len, dtype=torch.bool)
    real[0, 1:3] = False
    full = maps.caught(a_recording(a_call(layout, real=real)), 0, "block", CLEARAttnProcessor(radius=99), CPU)
    assert full.mass == pytest.approx(1, abs=1e-5)
    assert maps.dense_weights(a_call(layout, real=real), 9)[1:3].sum() == 0


def test_caught_mass_is_of_sampled_places_where_there_are_many(monkeypatch):
    call, processor = a_call(TokenLayout((12, 12))), PROCESSORS["clear"]
    whole = maps.caught(a_recording(call), 0, "block", processor, CPU)
    monkeypatch.setattr(maps, "_SAMPLED", 36)
    some = maps.caught(a_recording(call), 0, "block", processor, CPU)
    assert (some.places, some.all_places) == (36, 144)
    assert some.mass == pytest.approx(whole.mass, rel=0.2) and some.mass != whole.mass


@layouts
def test_the_map_of_sla_is_what_the_library_selects(layout):
    for name in ("sla", "sla-tiles"):
        call, processor = a_call(layout), PROCESSORS[name]
        found = maps.block_map(call, processor)
        tables = [sla._blocks(layout, size, processor.tile_order, CPU)[0] for size in (8, processor.block_kv)]
        real = torch.ones(1, layout.grid_len, dtype=torch.bool)
        chosen, kept, marginal = sla._select(
            call.query, call.key, layout, *tables, real, processor.critical, processor.negligible, processor.smooth_key
        )
        expected = marginal[0].int() * maps.LINEAR
        for row, blocks in enumerate(chosen[0]):
            expected[row, blocks[kept[0]]] = maps.CRITICAL
        assert torch.equal(found.states, expected)
        assert set(found.states.unique().tolist()) == {maps.LEFT_OUT, maps.LINEAR, maps.CRITICAL}


@pytest.mark.parametrize("dim", [8, 64])
@layouts
def test_the_map_of_llsa_is_what_the_library_selects(layout, dim):
    """Also where there are more blocks than values have columns."""
    call, processor = a_call(layout, dim=dim), PROCESSORS["llsa"]
    found = maps.block_map(call, processor)
    tree = llsa.make_tree(layout.grid, 4, 2, CPU)
    real = torch.ones(1, layout.grid_len, dtype=torch.bool)
    pools = [llsa._pool(x[:, :, layout.grid_slice], tree, real) for x in (call.query, call.key)]
    kept, _ = llsa._select(*pools, tree, 2)
    expected = torch.zeros_like(found.states)
    for row, blocks in enumerate(kept[0]):
        expected[row, blocks[blocks >= 0]] = maps.CRITICAL
    assert torch.equal(found.states, expected)


@layouts
def test_the_map_agrees_with_what_a_place_sees(layout):
    for name in ("sla", "sla-tiles", "llsa"):
        call, processor = a_call(layout), PROCESSORS[name]
        found = maps.block_map(call, processor)
        blocks = maps._block_of(maps._tables(layout, processor)[1], layout.grid_len)
        for place in (0, layout.grid_len // 2, layout.grid_len - 1):
            seen = maps.visible(call, processor, layout.before + place)[layout.grid_slice]
            row = found.states[found.query_block[place]] == maps.CRITICAL
            assert torch.equal(seen, row[blocks])


def test_windows_have_no_map_and_neither_have_too_many_blocks(monkeypatch):
    call = a_call(LAYOUTS[0])
    assert maps.block_map(call, PROCESSORS["clear"]) is maps.block_map(call, PROCESSORS["gna"]) is None
    monkeypatch.setattr(maps, "_MOST_BLOCKS", 4)
    assert maps.block_map(call, PROCESSORS["sla"]) is None


def test_steps_are_spread_from_the_first_to_the_last():
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


def test_recording_leaves_the_picture_as_it_is_and_the_pipeline_dense(pipe):
    before = draw(pipe)
    processors = {name: id(module.processor) for name, module in _with_processor(pipe)}
    with maps.recording(pipe, (0, 2)) as kept:
        during = draw(pipe)
    assert (before == during).all()
    assert {name: id(module.processor) for name, module in _with_processor(pipe)} == processors
    assert {step for step, _ in kept.calls} == {0, 2}
    assert {layer for _, layer in kept.calls} == set(kept.layers)


def _with_processor(pipe):
    model = pipe.components.get("transformer") or pipe.components["unet"]
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "processor")]


class Overhear(TorchFunctionMode):
    """Keeps the queries of every softmax call."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.queries.append((*args, *(kwargs or {}).values())[0].clone())
        return func(*args, **(kwargs or {}))


def test_recorded_calls_are_the_host_s_own(pipe):
    """The last of the batch, and of the calls with and without the prompt the first."""
    with Overhear() as heard:
        draw(pipe)
    with maps.recording(pipe, (1,)) as kept:
        draw(pipe)
    for call in kept.calls.values():
        assert call.query.shape[0] == 1 and call.layout.seq_len == call.query.shape[2]
        assert any(torch.equal(query[-1:], call.query) for query in heard.queries)


def test_memory_is_bounded_by_fewer_steps_and_then_fewer_layers(tmp_path):
    pipe = load(save_flux, tmp_path)
    with maps.recording(pipe, (0, 1, 2)) as kept:
        draw(pipe)
    each = next(iter(kept.calls.values())).n_bytes
    layers = len(kept.layers)
    with maps.recording(pipe, (0, 1, 2), most_bytes=each * layers * 2) as fewer:
        draw(pipe)
    assert fewer.steps == (0, 2) and fewer.layers == kept.layers and len(fewer.calls) == 2 * layers
    with maps.recording(pipe, (0, 1, 2), most_bytes=each * 2) as fewest:
        draw(pipe)
    assert fewest.steps == (0,) and fewest.layers == (kept.layers[0], kept.layers[-1])
    assert fewest.n_bytes <= each * 2


def test_a_head_is_looked_at_by_itself():
    call = a_call(LAYOUTS[0], heads=3)
    one = call.head(2)
    assert torch.equal(one.query, call.query[:, 2:3])
    other = replace(call, query=call.query.flip(1), key=call.key.flip(1))
    assert torch.equal(maps.dense_weights(one, 9), maps.dense_weights(other.head(0), 9))
