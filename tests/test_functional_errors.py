"""Invalid input is refused before any work, with messages that say what came and what to do."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.functional import clear_attention, gna_attention, llsa_attention, sla_attention

LAYOUT = TokenLayout((6, 8), 2)
VALID = {
    sla_attention: {},
    clear_attention: {"radius": 3},
    llsa_attention: {},
    gna_attention: {"window": 3},
}
NAN = math.nan

BAD_OPTIONS = [
    (clear_attention, {"radius": 0}, ValueError, "radius must be greater than 0, got 0"),
    (clear_attention, {"radius": -1.5}, ValueError, "got -1.5"),
    (clear_attention, {"radius": NAN}, ValueError, "NaN"),
    (clear_attention, {"radius": (2, NAN)}, ValueError, "NaN"),
    (clear_attention, {"radius": "8"}, TypeError, "radius must be a number"),
    (clear_attention, {"radius": (2, 3, 4)}, ValueError, "3 values but grid .* has 2 axes"),
    (clear_attention, {"radius": ()}, ValueError, "one per axis"),
    (clear_attention, {"radius": 3, "down_factor": 0}, ValueError, "down_factor must be at least 1"),
    (clear_attention, {"radius": 3, "down_factor": 2.0}, TypeError, "down_factor must be an int"),
    (clear_attention, {"radius": 3, "down_factor": 2, "pool_weight": torch.ones(3, 3)}, ValueError, r"shape \(2, 2\)"),
    (llsa_attention, {"block_size": 1}, ValueError, "block_size must be at least 2, got 1"),
    (llsa_attention, {"levels": 0}, ValueError, "levels must be at least 1, got 0"),
    (llsa_attention, {"topk": 0}, ValueError, "topk must be at least 1, got 0"),
    (llsa_attention, {"topk": True}, TypeError, "topk must be an int"),
    (llsa_attention, {"enrich": 1}, TypeError, "enrich must be True or False"),
    (gna_attention, {"window": 7}, ValueError, "window 7 is larger than axis 0 .* at most 6"),
    (gna_attention, {"window": 3, "stride": 4}, ValueError, "stride 4 is larger than window 3"),
    (gna_attention, {"window": (3, 3, 3)}, ValueError, "3 values but grid .* has 2 axes"),
    (gna_attention, {"window": 4, "dilation": 2}, ValueError, "dilation of at most 1"),
    (gna_attention, {"window": 0}, ValueError, "window must be at least 1"),
    (gna_attention, {"window": 3, "stride": 0}, ValueError, "stride must be at least 1"),
    (gna_attention, {"window": 3, "dilation": 0}, ValueError, "dilation must be at least 1"),
    (gna_attention, {"window": 3.0}, TypeError, "window must be an int"),
    (gna_attention, {"window": ()}, ValueError, "window must be an int or one per axis"),
    (gna_attention, {"window": (3, 3), "stride": (1, 1, 1)}, ValueError, "give one value, or one per axis"),
    (gna_attention, {"window": 3, "is_causal": 1}, TypeError, "is_causal must be True or False"),
    (sla_attention, {"critical": 0}, ValueError, r"critical must be in \(0, 1\], got 0"),
    (sla_attention, {"critical": 1.1}, ValueError, "critical must be in"),
    (sla_attention, {"critical": NAN}, ValueError, "NaN"),
    (sla_attention, {"negligible": -0.1}, ValueError, "negligible must not be negative, got -0.1"),
    (sla_attention, {"critical": 0.6, "negligible": 0.5}, ValueError, r"at most 1, got 0.6 \+ 0.5"),
    (sla_attention, {"block_q": 1}, ValueError, "block_q must be at least 2"),
    (sla_attention, {"block_kv": 0}, ValueError, "block_kv must be at least 2"),
    (
        sla_attention,
        {"feature_map": "gelu"},
        ValueError,
        "feature_map must be one of 'softmax', 'elu', 'relu', got 'gelu'",
    ),
    (sla_attention, {"linear_over": "none"}, ValueError, "linear_over must be one of"),
    (sla_attention, {"smooth_key": "yes"}, TypeError, "smooth_key must be True or False"),
    (sla_attention, {"weight": torch.ones(8, 4)}, ValueError, r"weight must have shape \(8, 8\), got \(8, 4\)"),
    (sla_attention, {"bias": torch.ones(4)}, ValueError, r"bias must have shape \(8,\)"),
    (sla_attention, {"bias": torch.ones(8, dtype=torch.int64)}, TypeError, "bias must be a floating tensor"),
]


def qkv():
    return [torch.randn(2, 2, LAYOUT.seq_len, 8) for _ in range(3)]


@pytest.mark.parametrize("function, options, error, message", BAD_OPTIONS)
def test_bad_options(function, options, error, message):
    with pytest.raises(error, match=message):
        function(*qkv(), LAYOUT, **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"layout": (6, 8)}, TypeError, "layout must be a TokenLayout"),
        ({"scale": "large"}, TypeError, "scale must be a number"),
        ({"scale": NAN}, ValueError, "scale .* NaN"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
    ],
)
@pytest.mark.parametrize("function", VALID)
def test_bad_layout_or_scale(function, change, error, message):
    qkv = [torch.randn(1, 1, LAYOUT.seq_len, 8) for _ in range(3)]
    with pytest.raises(error, match=message):
        function(*qkv, **VALID[function] | {"layout": LAYOUT} | change)


@pytest.mark.parametrize("function", [clear_attention, gna_attention])
def test_windows_need_a_layout(function):
    qkv = [torch.randn(1, 1, LAYOUT.seq_len, 8) for _ in range(3)]
    with pytest.raises(TypeError, match="got None"):
        function(*qkv, None, **VALID[function])


def test_pooling_needs_two_axes():
    with pytest.raises(ValueError, match="down_factor 2 pools tiles of two axes"):
        clear_attention(*qkv(), TokenLayout((48,), 2), radius=3, down_factor=2)


@pytest.mark.parametrize("function", VALID)
class TestTensors:
    def test_layout_of_another_length(self, function):
        with pytest.raises(ValueError, match=r"layout 2\+6×7\+0 has 44 tokens but query has 50"):
            function(*qkv(), TokenLayout((6, 7), 2), **VALID[function])

    def test_another_dtype(self, function):
        q, k, v = qkv()
        with pytest.raises(ValueError, match=r"key is torch.float16 but query torch.float32"):
            function(q, k.half(), v, LAYOUT, **VALID[function])

    def test_another_head_dim(self, function):
        q, k, v = qkv()
        with pytest.raises(ValueError, match="value has head dim 4 but query 8"):
            function(q, k, v[..., :4], LAYOUT, **VALID[function])

    def test_another_device(self, function):
        q, k, v = qkv()
        with pytest.raises(ValueError, match="value is on meta but query on cpu"):
            function(q, k, v.to("meta"), LAYOUT, **VALID[function])

    @pytest.mark.parametrize("cut", [(slice(1),), (slice(None), slice(1)), (slice(None), slice(None), slice(49))])
    def test_another_shape(self, function, cut):
        q, k, v = qkv()
        with pytest.raises(ValueError, match=r"key has shape .* but query"):
            function(q, k[cut], v, LAYOUT, **VALID[function])

    def test_wrong_rank(self, function):
        q, k, v = qkv()
        with pytest.raises(ValueError, match=r"query must have shape \(B, H, S, D\), got \(2, 50, 8\)"):
            function(q[0], k[0], v[0], LAYOUT, **VALID[function])

    def test_integers(self, function):
        with pytest.raises(ValueError, match=r"floating dtype, got torch\.int64"):
            function(*(x.long() for x in qkv()), LAYOUT, **VALID[function])

    def test_not_a_tensor(self, function):
        q, k, _ = qkv()
        with pytest.raises(TypeError, match="value must be a tensor"):
            function(q, k, None, LAYOUT, **VALID[function])

    @pytest.mark.parametrize("shape", [(50,), (1, 50), (2, 48), (2, 1, 1, 50)])
    def test_mask_of_another_shape(self, function, shape):
        with pytest.raises(ValueError, match=r"key_mask must have shape \(B, S\) = \(2, 50\)"):
            function(*qkv(), LAYOUT, **VALID[function], key_mask=torch.ones(shape, dtype=torch.bool))

    def test_mask_of_another_dtype(self, function):
        with pytest.raises(TypeError, match="key_mask must be a bool tensor"):
            function(*qkv(), LAYOUT, **VALID[function], key_mask=torch.ones(2, 50))
