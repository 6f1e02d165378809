"""A mechanism registered from outside the package is used like the package's own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import gradio as gr
import pytest
import torch
import torch.nn.functional as F
from tiny import flux, flux_inputs, run
from tiny_pipelines import save_flux
from toy_mechanism import CombAttnProcessor

import dit_accel
from dit_accel import TokenLayout, functional
from dit_accel.cli.app import main
from dit_accel.demo.ui.controls import MechanismControls
from dit_accel.demo.ui.engine import Engine
from dit_accel.mechanisms import registry
from dit_accel.mechanisms.attn_spec import parse_attention, short_options
from dit_accel.mechanisms.registry import PROCESSORS, register_processor

del PROCESSORS["comb"]  # registered only while these tests run: others list all mechanisms


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_processor(CombAttnProcessor)
    yield
    del PROCESSORS["comb"]


def masked(query, key, value, layout, period):
    return F.scaled_dot_product_attention(query, key, value, CombAttnProcessor(period=period).visible(layout))


def test_function_operator_and_compilation():
    layout = TokenLayout((4, 6), 3)
    q, k, v = (torch.randn(1, 2, layout.seq_len, 8, requires_grad=True) for _ in range(3))
    out = functional.comb_attention(q, k, v, layout, period=3)
    torch.testing.assert_close(out, masked(q, k, v, layout, 3))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(masked(q, k, v, layout, 3).square().sum(), (q, k, v))
    torch.testing.assert_close(grads, expected)
    compiled = torch.compile(functional.comb_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, layout, period=3), out)
    assert "period: distance between the keys" in functional.comb_attention.__doc__
    with pytest.raises(TypeError, match="comb has no option 'periods'; expected period"):
        functional.comb_attention(q, k, v, layout, periods=3)


def test_install_describe_save_and_load(tmp_path):
    model, inputs = flux(), flux_inputs((6, 8))
    dense = run(model, inputs)
    model.set_attn_processor(CombAttnProcessor(period=100))
    out = run(model, inputs)
    assert not torch.allclose(out, dense)
    assert "comb(period=100)" in dit_accel.describe(model) and "period 100 → 48" in dit_accel.describe(model)
    assert 0 < dit_accel.logit_fraction(model) < 1
    dit_accel.save_attention(model, tmp_path)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
    dit_accel.load_attention(model, tmp_path)
    assert torch.equal(run(model, inputs), out)


def test_command_line_and_app(tmp_path):
    pipeline = save_flux(tmp_path / "flux")
    attention = parse_attention("comb:period=5;period=2@single")
    assert short_options(attention.processor()) == "period=5"
    arguments = ["compare", "--pipeline", str(pipeline), "--steps", "1", "--height", "32", "--width", "32"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--prompt", "a", "--attn", "comb:period=2", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 0 and (tmp_path / "out" / "pictures" / "1-comb.png").is_file()
    with Engine(str(pipeline), torch.device("cpu"), torch.float32) as engine, gr.Blocks():
        controls = MechanismControls(engine)
        assert ("Comb: every n-th token", "comb") in controls.choice.choices
        values = [7 if key == ("comb", "period") else slider.value for key, slider in controls.sliders.items()]
        assert controls.student(engine.kinds[0], "comb", *values).options == {"period": 7}


def test_a_subclass_needs_its_own_registration():
    """Else it would compute what its base class does."""

    @dataclass(frozen=True, kw_only=True)
    class Changed(dit_accel.GNAAttnProcessor):
        def compute(self, *args, **options):
            raise AssertionError("not called")

    with pytest.raises(TypeError, match="Changed is not registered: put @dit_accel"):
        Changed(window=3)


def test_broken_package_of_another_does_not_hide_the_others(monkeypatch):
    broken = EntryPoint("other", "no_such_module", "dit_accel.processors")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    registry._load_entry_points.cache_clear()
    with pytest.warns(UserWarning, match="the mechanism other .no_such_module. could not be loaded"):
        assert registry.find_processor("gnaa") is None
    assert registry.find_processor("gna") is dit_accel.GNAAttnProcessor


def test_registration_refuses_what_cannot_work():
    def declare(bases=(dit_accel.AcceleratedAttnProcessor,), frozen=True, **attributes):
        body = {"name": "other", "label": "Other", "summary": "", "__annotations__": {}, "__module__": __name__}
        annotations = {key: ClassVar[str] for key in ("name", "label", "summary")}
        given = attributes.pop("annotations", {})
        kind = type("Other", bases, {**body, **attributes, "__annotations__": annotations | given})
        return dataclass(frozen=True, kw_only=True)(kind) if frozen else kind

    for kind, error, message in (
        (int, TypeError, "expected a subclass"),
        (declare(frozen=False), TypeError, "must be a dataclass"),
        (declare(label=None), TypeError, "needs the class attribute label"),
        (declare(name="Two words"), ValueError, "lower-case letters"),
        (declare(name="sla"), ValueError, "'sla' is dit_accel.mechanisms.sla.SLAAttnProcessor"),
        (declare(annotations={"sizes": dict}, sizes=None), TypeError, "Other.sizes has the type"),
    ):
        with pytest.raises(error, match=message):
            register_processor(kind)
    assert "other" not in PROCESSORS
