"""Properties that hold for any data: batches, windows, counts of logits, options shrunk to small layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor, TokenLayout, functional
from dit_accel.mechanisms import clear, gna, llsa, sla

FUNCTIONS = [sla.sla_attention, clear.clear_attention, llsa.llsa_attention, gna.gna_attention]
MODULES = dict(zip(FUNCTIONS, (sla, clear, llsa, gna), strict=True))
KINDS = dict(zip(FUNCTIONS, (SLAAttnProcessor, CLEARAttnProcessor, LLSAAttnProcessor, GNAAttnProcessor), strict=True))
quick = settings(max_examples=15, deadline=None, derandomize=True)

grids = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
layouts = st.builds(TokenLayout, grids, st.integers(0, 3), st.integers(0, 3))


@st.composite
def calls(draw):
    """A function, a layout and matching options."""
    function, layout = draw(st.sampled_from(FUNCTIONS)), draw(layouts)
    if function is gna.gna_attention:
        windows = [draw(st.integers(1, n)) for n in layout.grid]
        options = {
            "window": windows,
            "stride": [draw(st.integers(1, w)) for w in windows],
            "dilation": [draw(st.integers(1, n // w)) for n, w in zip(layout.grid, windows, strict=True)],
            "is_causal": [draw(st.booleans()) for _ in windows],
        }
    elif function is clear.clear_attention:
        options = {"radius": [draw(st.floats(0.1, 9)) for _ in layout.grid]}
        options["down_factor"] = draw(st.integers(1, 3)) if len(layout.grid) > 1 else 1
    elif function is sla.sla_attention:
        critical = draw(st.floats(0.01, 1))
        options = {
            "critical": critical,
            "negligible": draw(st.floats(0, 1)) * (1 - critical),
            "block_q": draw(st.integers(2, 20)),
            "block_kv": draw(st.integers(2, 20)),
            "tile_order": draw(st.booleans()),
            "linear_over": draw(st.sampled_from(sla.LINEAR_OVER)),
            "weight": torch.eye(8),
        }
    else:
        options = {
            "block_size": draw(st.integers(2, 9)),
            "topk": draw(st.integers(1, 5)),
            "levels": draw(st.sampled_from([None, 1, 2, 3])),
            "enrich": draw(st.booleans()),
        }
    return function, layout, options


def qkv(layout, batch=3, heads=2, dim=8):
    generator = torch.Generator().manual_seed(layout.seq_len)
    return [torch.randn(batch, heads, layout.seq_len, dim, generator=generator) for _ in range(3)]


@quick
@given(calls())
def test_agrees_with_its_reference(call):
    function, layout, options = call
    tensors = qkv(layout)
    torch.testing.assert_close(
        function(*tensors, layout, **options),
        MODULES[function].reference(*tensors, layout, **options),
        rtol=1e-5,
        atol=1e-5,
    )


@quick
@given(calls(), st.permutations(range(3)))
def test_permuting_the_batch_permutes_the_output(call, order):
    function, layout, options = call
    tensors = qkv(layout)
    out = function(*tensors, layout, **options)
    torch.testing.assert_close(
        function(*(x[order] for x in tensors), layout, **options), out[order], rtol=1e-5, atol=1e-5
    )


@quick
@given(calls())
def test_one_value_everywhere_comes_back(call):
    """Softmax weights add up to one."""
    function, layout, options = call
    q, k, v = qkv(layout)
    options = {name: x for name, x in options.items() if name != "weight"}
    v = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(function(q, k, v, layout, **options), v, rtol=1e-5, atol=1e-5)


@quick
@given(layouts, st.data())
def test_keys_outside_the_window_do_not_matter(layout, data):
    function = data.draw(st.sampled_from([clear.clear_attention, gna.gna_attention]))
    options = (
        {"radius": data.draw(st.floats(0.5, 4))}
        if function is clear.clear_attention
        else {"window": [data.draw(st.integers(1, n)) for n in layout.grid]}
    )
    q, k, v = qkv(layout, batch=1)
    query = data.draw(st.integers(layout.before, layout.before + layout.grid_len - 1))
    visible = (
        MODULES[function].reference(
            torch.zeros_like(q[..., :1]).expand(1, 2, -1, layout.seq_len),
            k.new_zeros(1, 2, layout.seq_len, layout.seq_len),
            torch.eye(layout.seq_len).expand(1, 2, -1, -1),
            layout,
            **options,
        )[0, 0, query]
        > 0
    )
    out = function(q, k, v, layout, **options)[:, :, query]
    for x in (k, v):
        x[:, :, ~visible] = 100
    torch.testing.assert_close(function(q, k, v, layout, **options)[:, :, query], out)


@quick
@given(calls())
def test_counted_logits_are_those_of_the_mask(call):
    """Zero queries weigh all keys equally: 1 / the largest weight of a row is its number of logits."""
    function, layout, options = call
    if function in (sla.sla_attention, llsa.llsa_attention):
        return  # the kept blocks depend on the data: see below
    counted = KINDS[function](**options).count_logits(layout)
    length = layout.seq_len
    zeros, eye = torch.zeros(1, 1, length, length), torch.eye(length)[None, None]
    without_pooling = {name: x for name, x in options.items() if name != "down_factor"}
    weights = MODULES[function].reference(zeros, zeros, eye, layout, **without_pooling)[0, 0]
    rows = (weights > 0).sum().item()
    f = options.get("down_factor", 1)
    pooled = 0 if f == 1 else math.prod(layout.grid[:-2]) * math.prod(-(-n // f) for n in layout.grid[-2:])
    assert counted == rows + pooled * layout.grid_len


def test_counted_logits_of_data_dependent_masks():
    layout = TokenLayout((16, 16), 10)
    text = 10 * 10 + 2 * 10 * 256
    assert SLAAttnProcessor(critical=0.25, block_kv=16).count_logits(layout) == 256 * 4 * 16 + text
    assert SLAAttnProcessor(critical=0.25, block_kv=64, tile_order=True).count_logits(layout) == 256 * 64 + text
    assert SLAAttnProcessor(critical=1.0, negligible=0.0).count_logits(layout) == layout.seq_len**2
    assert LLSAAttnProcessor(topk=4).count_logits(layout) == 256 * (4 * 16 + 16) + text
    assert LLSAAttnProcessor(topk=4, enrich=False).count_logits(layout) == 256 * 4 * 16 + text
    assert LLSAAttnProcessor(topk=2, block_size=4, levels=2).count_logits(layout) == 256 * (8 + 8 + 16) + text


@pytest.mark.parametrize(
    "processor",
    [
        GNAAttnProcessor(window=48), CLEARAttnProcessor(radius=30, down_factor=4), SLAAttnProcessor(),
        LLSAAttnProcessor(levels=2), LLSAAttnProcessor(),
    ],
    ids=str,
)  # fmt: skip
def test_counting_is_cheap_at_a_million_tokens(processor):
    for layout in (TokenLayout((1024, 1024), 512), TokenLayout((64, 128, 128))):
        assert 0 < processor.count_logits(layout) < 0.2 * layout.seq_len**2


FITS = [
    (GNAAttnProcessor, (4, 8, 6), {"window": 7, "stride": 5}, {"window": (4, 7, 6), "stride": (4, 5, 5)}),
    (
        GNAAttnProcessor,
        (1, 30, 30),
        {"window": (5, 9, 9), "dilation": (1, 4, 2)},
        {"window": (1, 9, 9), "dilation": (1, 3, 2)},
    ),
    (GNAAttnProcessor, (9,), {"window": 3}, {"window": (3,), "stride": (1,), "dilation": (1,), "is_causal": (False,)}),
    (CLEARAttnProcessor, (4, 5), {"radius": 8, "down_factor": 9}, {"radius": (8, 8), "down_factor": 9}),
    (CLEARAttnProcessor, (40,), {"radius": 8, "down_factor": 2}, {"radius": (8,), "down_factor": 1}),
    (LLSAAttnProcessor, (4, 4), {"levels": 3}, {"levels": 1}),
    (LLSAAttnProcessor, (16, 17), {"levels": 9}, {"levels": 3}),
    (LLSAAttnProcessor, (16, 17), {}, {"levels": None, "block_size": 16, "topk": 8, "enrich": True}),
    (SLAAttnProcessor, (5, 5), {"critical": 0.3}, {"critical": 0.3}),
]


@pytest.mark.parametrize("kind, grid, options, expected", FITS)
def test_fit_shrinks_to_the_layout(kind, grid, options, expected):
    layout, processor = TokenLayout(grid, 2), kind(**options)
    fitted = processor.fit(layout)
    assert {name: fitted.options()[name] for name in expected} == expected
    assert fitted.fit(layout) == fitted
    tensors = qkv(layout)
    function = getattr(functional, f"{kind.name}_attention")
    assert torch.equal(processor.attend(*tensors, layout), function(*tensors, layout, **fitted.options()))


@pytest.mark.parametrize("processor", [GNAAttnProcessor(window=(3, 3)), CLEARAttnProcessor(radius=(3, 3))], ids=str)
def test_fit_refuses_another_number_of_axes(processor):
    layout = TokenLayout((4, 5, 6))
    with pytest.raises(ValueError, match=r"2 values but grid .* has 3 axes"):
        processor.fit(layout)
    with pytest.raises(ValueError, match=r"2 values but grid .* has 3 axes"):
        processor.attend(*qkv(layout), layout)


def test_high_resolution_scale():
    layout, radius = TokenLayout((6, 7), 3), 2.5
    tensors = qkv(layout)
    for f, length in ((1, 45), (2, 450)):
        scale = math.sqrt(math.log(length, 20) / 8)
        want = clear.clear_attention(*tensors, layout, radius=radius, down_factor=f, scale=scale)
        got = clear.clear_attention(*tensors, layout, radius=radius, down_factor=f, train_tokens=20)
        torch.testing.assert_close(got, want)
