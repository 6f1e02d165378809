"""Search of options per layer."""

import random

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import save_wan

from dit_accel.conversion.data.samples import Sample
from dit_accel.conversion.recipes.capture import capture
from dit_accel.demo.training.search_layer_options import Options, Search, main
from dit_accel.install.installation import denoisers, installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention


@pytest.mark.parametrize("grid", [(64, 64), (13, 16, 16)])
@pytest.mark.parametrize("name", ["sla", "clear", "llsa", "gna"])
def test_choice_round_trips_through_text(name, grid):
    options, rng = Options(name, grid), random.Random(0)
    choice = tuple(len(axis) // 2 for axis in options.axes)
    for _ in range(50):
        choice = options.neighbour(choice, rng)
        assert options.choice(parse_attention(f"{name}:{options.text(choice)}").processor()) == choice


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Pipeline, its denoiser, and a sample of 2×8×8 tokens."""
    pipe = DiffusionPipeline.from_pretrained(save_wan(tmp_path_factory.mktemp("wan") / "wan"))
    (model,) = denoisers(pipe).values()
    conditions = capture(pipe, model, {"prompt": "a red circle", "height": 128, "width": 128, "num_frames": 5})
    noise = torch.randn(conditions.shape, generator=torch.Generator().manual_seed(0))
    return pipe, model, Sample(noise, conditions)


@pytest.mark.parametrize(
    "begin", ["gna:window=2x4x4", "clear:radius=3", "sla:critical=0.2,block_q=8,block_kv=8,tile_order=true"]
)
def test_distance_decreases_and_pipeline_stays_dense(wan, begin):
    pipe, model, sample = wan
    search = Search(pipe, parse_attention(begin), [sample], share=0.3, seed=0)
    losses = [search.loss]
    for _ in range(5):
        better = search.round(lambda: False)
        losses.append(search.loss)
        assert search.cost(search.choices) <= 0.3 and (losses[-1] < losses[-2]) == better
    assert losses[-1] < losses[0]
    assert search.measure(search.choices) == losses[-1] and not installed_layers(model)


@pytest.mark.parametrize(
    "begin, message",
    [
        ("gna:window=2x8x8", "start from options with a lower cost"),
        ("gna:window=2x2x2,stride=2", "gna: the search varies only window"),
        ("llsa:block_size=64,levels=1", "llsa: the search varies only topk"),
    ],
)
def test_invalid_initial_options_raise_a_clear_error(wan, begin, message):
    with pytest.raises(ValueError, match=message):
        Search(wan[0], parse_attention(begin), [wan[2]], share=0.1, seed=0)
    assert not installed_layers(wan[1])


def test_folder_without_samples_gives_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["search_layer_options", "image", "--attn", "gna:window=8x8", "--samples", "x", "--out", "y"]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main()
    assert "no encoded samples in x: pass the folder" in capsys.readouterr().err
