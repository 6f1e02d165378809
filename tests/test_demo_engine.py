"""Engine of the app: turns, stopping, and reset to dense attention."""

import os
import threading
import time

import numpy as np
import pytest
import torch
from tiny_pipelines import save_flux, save_wan

import dit_accel
from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import Size
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.work import Stops, message_for, stream
from dit_accel.install.installation import denoisers, installation_of

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


def test_engine_lists_the_kinds_and_defaults_of_its_pipelines(engine, tmp_path):
    loaded = engine.about("image")
    assert engine.kinds == ("image",) and loaded.size.height > 0 and loaded.size.frames is None and loaded.steps > 0
    with pytest.raises(BadInput, match="no video pipeline"):
        engine.about("video")
    with Engine(str(save_wan(tmp_path / "wan")), CPU, torch.float32) as other:
        assert other.kinds == ("video",) and other.about("video").size.frames


def test_drawing_uses_the_installed_attention_and_then_resets_it(engine):
    dense = draw(engine)
    clear = draw(engine, dit_accel.CLEARAttnProcessor(radius=2))
    assert dense.frames.shape == clear.frames.shape == (1, 32, 32, 3)
    assert not np.array_equal(dense.frames, clear.frames)
    assert dense.logit_fraction == 1 > clear.logit_fraction and clear.seconds_per_step > 0
    assert np.array_equal(draw(engine).frames, dense.frames)


def test_pipeline_is_dense_after_a_failed_turn(engine):
    with pytest.raises(ArithmeticError), engine.turn("image") as loaded:
        loaded.pipe.set_attn_processor(dit_accel.CLEARAttnProcessor(radius=2))
        raise ArithmeticError
    assert all(installation_of(model) is None for model in denoisers(loaded.pipe).values())


def test_steps_are_reported_with_their_latents(engine):
    events = []
    draw(engine, on_step=lambda step, latents: events.append((step, latents.shape)), steps=3)
    assert [step for step, _ in events] == [1, 2, 3] and len({shape for _, shape in events}) == 1


def test_stop_ends_within_a_step_and_leaves_no_hooks(engine):
    stop, calls = Stop(), []
    model = engine.about("image").pipe.transformer
    hooks = sum(len(part._forward_pre_hooks) for part in model.modules())

    def count_and_stop(*_):
        calls.append(1)
        stop.set()

    handles = [part.register_forward_hook(count_and_stop) for part in model.modules() if hasattr(part, "processor")]
    with pytest.raises(Cancelled):
        draw(engine, stop=stop)
    for handle in handles:
        handle.remove()
    assert len(calls) == 1, "the next attention layer of the same step ends it"
    assert sum(len(part._forward_pre_hooks) for part in model.modules()) == hooks


def test_turns_do_not_overlap_and_keep_the_order_of_arrival(engine):
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


def test_waiting_for_a_turn_can_be_cancelled(engine):
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


def test_queue_reports_positions_and_has_a_limit(engine, monkeypatch):
    positions, threads = [[], []], []
    monkeypatch.setattr("dit_accel.demo.ui.engine.MAX_WAITING", 2)

    def wait(number):
        with engine.turn("image", on_wait=positions[number].append):
            pass

    with engine.turn("image"):
        for number in range(2):
            threads.append(in_thread(lambda number=number: wait(number)))
            while len(positions[number]) < 1:
                time.sleep(0.001)
        with pytest.raises(BadInput, match="2 requests are already waiting"), engine.turn("image"):
            pytest.fail("a third may wait")
    for thread in threads:
        thread.join()
    assert positions[0] == [1] and positions[1][0] == 2


def test_concurrent_drawings_equal_separate_drawings(engine):
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


def test_temporary_folder_is_removed_on_exit(tmp_path):
    with Engine(None, CPU, torch.float32) as engine:
        (engine.folder / "file").write_text("x")
        assert engine.kinds == ("image", "video")
    assert not engine.folder.exists()


def test_temporary_folder_is_removed_if_loading_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BadInput, match="no folder"):
        Engine(str(tmp_path / "nothing"), CPU, torch.float32)
    assert os.listdir(tmp_path) == []


def test_conversions_made_in_the_app_are_listed(engine, tmp_path):
    assert engine.conversions("image") == {}
    engine.add_conversion("image", "mine", tmp_path)
    assert engine.conversions("image") == {"mine": tmp_path} and engine.conversions("video") == {}


def test_stream_yields_events_and_raises_errors_of_the_work():
    def work(report):
        report(1)
        report(2)
        raise BadInput("no")

    events = []
    with pytest.raises(BadInput, match="no"):
        events.extend(event for event in stream(work, Stop()) if event is not None)
        pytest.fail("the error was swallowed")
    events = stream(work, Stop())
    assert [next(events), next(events)] == [1, 2]


def test_closing_a_stream_stops_the_work():
    stop, ended = Stop(), threading.Event()

    def work(report):
        try:
            for count in range(10_000):
                stop.check()
                report(count)
                time.sleep(0.001)
        finally:
            ended.set()

    events = stream(work, stop)
    assert next(events) == 0
    events.close()
    assert ended.wait(5)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Cancelled(), "Stopped"),
        (BadInput("the prompt is empty"), "The prompt is empty"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "Out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "Out of memory"),
        (MemoryError(), "Out of memory"),
        (RuntimeError("strange"), "did not work: RuntimeError: strange"),
    ],
)
def test_error_messages_have_no_stack_trace(error, message):
    assert message in message_for(error)


def test_stop_flags_of_pages_are_independent():
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
