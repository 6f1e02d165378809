"""Losses of the recipes against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel.conversion.recipes.capture import Conditions
from dit_accel.conversion.recipes.matching import matching_loss
from dit_accel.conversion.recipes.noise import NoiseProcess
from dit_accel.conversion.recipes.objective import Batch, losses_of
from dit_accel.conversion.recipes.recipe import RECIPES
from dit_accel.conversion.recipes.selection import Selection, default_layer_count


def test_selection_losses_equal_the_formulas():
    layers = {name: torch.nn.Module() for name in "abcd"}
    selection = Selection(layers, 3, torch.device("cpu"))
    assert selection.scores() == pytest.approx(dict.fromkeys("abcd", 0.1))
    selection.restore({"a": 0.75, "b": 0.25, "c": 0.6, "d": 0.25})
    found = selection.losses(0.5)  # alpha 11
    assert found["count"].item() == pytest.approx((1.85 - 3) ** 2)
    assert found["binary"].item() == pytest.approx(4 - 3 * 0.5**11 - 0.2**11)
    found["count"].backward()
    assert [layer.score.grad.item() for layer in layers.values()] == pytest.approx([2 * (1.85 - 3)] * 4)
    assert selection.selected() == ["a", "b", "c"]  # ties go to the earlier layer
    selection.remove()
    assert not list(layers["a"].named_parameters())
    # 30 and 40 are the layers of Wan 1.3B and 14B; 16 and 22 are the paper's numbers
    assert [default_layer_count(layers) for layers in (1, 30, 40)] == [1, 16, 22]


def test_scores_end_at_0_or_1_for_the_cheapest_layers():
    """Also if the costs are small compared with the weights of the two losses."""
    layers, steps = {str(i): torch.nn.Module() for i in range(8)}, 300
    selection, costs = Selection(layers, 3, torch.device("cpu")), torch.tensor([4, 7, 1, 8, 5, 2, 6, 3]) * 1e-3
    optimizer = torch.optim.AdamW([selection.optimizer_group(steps)])
    for step in range(steps):
        parts = selection.losses(step / (steps - 1))
        scores = torch.stack([layer.score for layer in layers.values()])
        (0.01 * (parts["count"] + parts["binary"]) + (costs * scores.square()).sum()).backward()
        optimizer.step()
        selection.clamp()
        optimizer.zero_grad()
    assert selection.selected() == ["2", "5", "7"]
    ends = selection.scores()
    assert all(abs(ends[name] - (name in selection.selected())) < 0.05 for name in layers)


class Scaled(torch.nn.Module):
    """A model that predicts its input times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, hidden_states, timestep, **_):
        return (self.factor * hidden_states,)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_distribution_matching_gradient_equals_the_formula(kind):
    """-(s - ŝ) dx̂/dû dû/dθ [LinVideo, eq. 12], with the scores of eq. 13 for flow matching."""
    angle = torch.linspace(0.1, 1.4, 10)
    curves = {} if kind == "flow" else {"keep": angle.cos(), "add": angle.sin()}
    process = NoiseProcess(kind, 10, **curves)
    student, teacher = Scaled(0.3), Scaled(0.8)
    x, levels, later = torch.randn(3, 4, 5), torch.full((3,), 0.75), torch.full((3,), 0.35)
    conditions = Conditions("hidden_states", (1, 4, 5), 1.0, {})
    prediction = student(x, None)[0]
    loss = matching_loss(student, teacher, process, conditions, x, prediction, levels, later)
    loss.backward()
    if kind == "flow":
        step = -(0.75 - 0.35)  # dx̂/dû
        sample = x + step * 0.3 * x
        gap = -(1 - 0.35) / 0.35 * (0.8 - 0.3) * sample
    else:
        (keep, add), (keep2, add2) = ((float(angle[i].cos()), float(angle[i].sin())) for i in (7, 3))
        if kind == "epsilon":
            step = add2 - keep2 * add / keep
            sample = keep2 / keep * x + step * 0.3 * x
            gap = -(0.8 - 0.3) * sample / add2
        else:  # keep · v + add · x is the noise, keep · x - add · v the clean latents
            step = add2 * keep - keep2 * add
            sample = (keep2 * keep + add2 * add) * x + step * 0.3 * x
            gap = -keep2 / add2 * (0.8 - 0.3) * sample
    torch.testing.assert_close(student.factor.grad, (-gap * step * x).mean())
    torch.testing.assert_close(loss.detach(), gap.square().mean() / 2)
    assert teacher.factor.grad is None


class Doubled(torch.nn.Module):
    """A model that predicts noise and a variance in twice the channels, like DiT."""

    def __init__(self, shift):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(shift))

    def forward(self, hidden_states, timestep, **_):
        return (torch.cat([hidden_states + self.shift, hidden_states * 2 - self.shift], 1),)


def test_lit_matches_the_variance_if_it_is_predicted():
    batch = Batch(*torch.randn(2, 3, 4, 5), torch.rand(3), torch.zeros(3), Conditions("hidden_states", (), 1.0, {}))
    stage, process = RECIPES["lit"].stages[0], NoiseProcess("flow", 1000)
    parts = losses_of(stage, Doubled(0.5), Doubled(0.2), [], process, batch)
    noisy, target = process.mix(batch.latents, batch.noise, batch.levels)
    torch.testing.assert_close(parts["flow"], F.mse_loss(noisy + 0.5, target))
    torch.testing.assert_close(parts["prediction"], torch.tensor(0.09))
    torch.testing.assert_close(parts["variance"], torch.tensor(0.09))
    assert [stage.weight(name) for name in parts] == [1, 0.5, 0.05]
    assert "variance" not in losses_of(stage, Scaled(0.5), Scaled(0.2), [], process, batch)
