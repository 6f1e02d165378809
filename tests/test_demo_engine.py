"""The app's engine: turns, stopping, and pipelines that are dense again afterwards."""

import os
import threading
import time

import numpy as np
import pytest
import torch
from tiny_pipelines import save_flux, save_wan

import dit_accel
from dit_accel.compare.sizes import Size
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.work import Stops, message_for, stream
from dit_accel.errors import BadInput
from dit_accel.install import denoisers, installation_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine(str(save_flux(tmp_path_factory.mktemp("flux"))), CPU, torch.float32) as engine:
        yield engine


def draw(engine, attention=None, seed=0, stop=None, on_step=None, steps=2):
    with engine.turn("image") as loaded:
        if attention is not None:
            loaded.pipe.set_attn_processor(attention)
        return engine.draw(loaded, "a red circle", seed, Size(32, 32), steps, stop or Stop(), on_step)


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_pipeline_says_what_it_draws(engine, tmp_path):
    loaded = engine.about("image")
    assert engine.kinds == ("image",) and loaded.size.height > 0 and loaded.size.frames is None and loaded.steps > 0
    with pytest.raises(BadInput, match="no video pipeline"):
        engine.about("video")
    with Engine(str(save_wan(tmp_path / "wan")), CPU, torch.float32) as other:
        assert other.kinds == ("video",) and other.about("video").size.frames


def test_drawing_is_that_of_the_attention_installed_and_the_pipeline_dense_afterwards(engine):
    dense = draw(engine)
    clear = draw(engine, dit_accel.CLEARAttnProcessor(radius=2))
    assert dense.frames.shape == clear.frames.shape == (1, 32, 32, 3)
    assert not np.array_equal(dense.frames, clear.frames)
    assert dense.logit_fraction == 1 > clear.logit_fraction and clear.seconds_per_step > 0
    assert np.array_equal(draw(engine).frames, dense.frames)


def test_pipeline_is_dense_after_a_turn_that_failed(engine):
    with pytest.raises(ArithmeticError), engine.turn("image") as loaded:
        loaded.pipe.set_attn_processor(dit_accel.CLEARAttnProcessor(radius=2))
        raise ArithmeticError
    assert all(installation_of(model) is None for model in denoisers(loaded.pipe).values())


def test_steps_are_told_with_their_latents(engine):
    seen = []
    draw(engine, on_step=lambda step, latents: seen.append((step, latents.shape)), steps=3)
    assert [step for step, _ in seen] == [1, 2, 3] and len({shape for _, shape in seen}) == 1


def test_stop_ends_the_denoiser_within_a_step_and_leaves_no_hooks(engine):
    stop, reached = Stop(), []
    model = engine.about("image").pipe.transformer
    hooks = sum(len(part._forward_pre_hooks) for part in model.modules())

    def reach(*_):
        reached.append(1)
        stop.set()

    handles = [part.register_forward_hook(reach) for part in model.modules() if hasattr(part, "processor")]
    with pytest.raises(Cancelled):
        draw(engine, stop=stop)
    for handle in handles:
        handle.remove()
    assert len(reached) == 1, "the next attention layer of the same step ends it"
    assert sum(len(part._forward_pre_hooks) for part in model.modules()) == hooks


def test_turns_do_not_overlap_and_go_first_come_first_served(engine):
    log, threads = [], []

    def use(name):
        with engine.turn("image"):
            log.append(f"{name} in")
            time.sleep(0.02)
            log.append(f"{name} out")

    with engine.turn("image"):
        for name in "abc":
            threads.append(in_thread(lambda name=name: use(name)))
            while len(engine._waiting) < len(threads) + 1:
                time.sleep(0.001)
        assert not log
    for thread in threads:
        thread.join()
    assert log == [f"{name} {way}" for name in "abc" for way in ("in", "out")]


def test_waiting_for_a_turn_can_be_given_up(engine):
    stop, ended = Stop(), []

    def wait():
        try:
            with engine.turn("image", stop):
                ended.append("had a turn")
        except Cancelled:
            ended.append("cancelled")

    with engine.turn("image"):
        thread = in_thread(wait)
        time.sleep(0.05)
        assert not ended
        stop.set()
        thread.join()
    assert ended == ["cancelled"]
    assert draw(engine).frames.any()


def test_who_waits_is_told_how_many_are_before_and_not_too_many_may_wait(engine, monkeypatch):
    told, threads = [[], []], []
    monkeypatch.setattr("dit_accel.demo.ui.engine.MOST_WAITING", 2)

    def wait(number):
        with engine.turn("image", on_wait=told[number].append):
            pass

    with engine.turn("image"):
        for number in range(2):
            threads.append(in_thread(lambda number=number: wait(number)))
            while len(told[number]) < 1:
                time.sleep(0.001)
        with pytest.raises(BadInput, match="2 requests wait"), engine.turn("image"):
            pytest.fail("a third may wait")
    for thread in threads:
        thread.join()
    assert told[0] == [1] and told[1][0] == 2


def test_two_at_once_with_other_mechanisms_each_draw_what_they_draw_alone(engine):
    attentions = {
        "clear": dit_accel.CLEARAttnProcessor(radius=2),
        "gna": dit_accel.GNAAttnProcessor(window=3),
        "dense": None,
    }
    alone = {name: draw(engine, attention).frames for name, attention in attentions.items()}
    together = {}
    threads = [
        in_thread(lambda name=name, attention=attention: together.update({name: draw(engine, attention).frames}))
        for name, attention in attentions.items()
    ]
    for thread in threads:
        thread.join()
    assert all(np.array_equal(together[name], alone[name]) for name in attentions)


def test_folder_is_gone_afterwards(tmp_path):
    with Engine(None, CPU, torch.float32) as engine:
        (engine.folder / "file").write_text("x")
        assert engine.kinds == ("image", "video")
    assert not engine.folder.exists()


def test_folder_is_gone_when_the_pipeline_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BadInput, match="no folder"):
        Engine(str(tmp_path / "nothing"), CPU, torch.float32)
    assert os.listdir(tmp_path) == []


def test_conversions_made_in_the_app_can_be_chosen(engine, tmp_path):
    assert engine.conversions("image") == {}
    engine.add_conversion("image", "mine", tmp_path)
    assert engine.conversions("image") == {"mine": tmp_path} and engine.conversions("video") == {}


def test_stream_gives_what_is_told_and_raises_what_the_work_raises():
    def work(tell):
        tell(1)
        tell(2)
        raise BadInput("no")

    seen = []
    with pytest.raises(BadInput, match="no"):
        seen.extend(event for event in stream(work, Stop()) if event is not None)
        pytest.fail("the error was swallowed")
    events = stream(work, Stop())
    assert [next(events), next(events)] == [1, 2]


def test_stream_that_is_given_up_stops_the_work():
    stop, ended = Stop(), threading.Event()

    def work(tell):
        try:
            for count in range(10_000):
                stop.check()
                tell(count)
                time.sleep(0.001)
        finally:
            ended.set()

    events = stream(work, stop)
    assert next(events) == 0
    events.close()
    assert ended.wait(5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Cancelled(), "Stopped"),
        (BadInput("the prompt is empty"), "The prompt is empty"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "Out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "Out of memory"),
        (MemoryError(), "Out of memory"),
        (RuntimeError("strange"), "did not work: RuntimeError: strange"),
    ],
)
def test_errors_are_said_in_words(error, said):
    assert said in message_for(error)


def test_a_page_stops_what_it_runs_and_no_other():
    stops = Stops()
    mine, other = stops.begin("mine"), stops.begin("other")
    stops.end("mine")
    other.check()
    with pytest.raises(Cancelled):
        mine.check()
    newer = stops.begin("other")
    newer.check()
    with pytest.raises(Cancelled):
        other.check()
