"""Speed benchmark of the page: measured sizes, break-even, and saved files."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dit_accel.common.errors import BadInput
from dit_accel.demo.ui import speed
from dit_accel.demo.ui.engine import Cancelled, Stop
from dit_accel.demo.ui.speed import Plan, Speed, break_even

CPU = torch.device("cpu")
FLOAT = torch.float32


def make_row(name, tokens, ms):
    times = {"first_call_s": 0.1, "ms": ms, "q1": ms * 0.9, "q3": ms * 1.1, "least": ms, "samples": 3, "calls": 1}
    about = {"attention": name, "tokens": tokens, "grid": [tokens], "options": {}, "logit_fraction": 0.1}
    return about | times | {"status": "complete"}


def make_rows(**times):
    sizes = (256, 1024, 4096, 16384)
    return [make_row(name, n, ms) for name, series in times.items() for n, ms in zip(sizes, series, strict=False)]


def test_break_even_is_the_crossing_of_the_curves():
    found = break_even(make_rows(dense=(1, 10, 100), sla=(4, 20, 50)), "sla")
    assert found.tokens == pytest.approx(2048)  # 2 times as slow at 1024, 2 times as fast at 4096
    assert found.ms == pytest.approx(1000**0.5)
    assert (found.slower, found.faster, found.largest) == (1024, 4096, 4096)
    assert found.times_dense == pytest.approx(2)


def test_break_even_requires_all_larger_sizes_to_be_faster():
    found = break_even(make_rows(dense=(10, 10, 100, 1000), gna=(1, 20, 50, 100)), "gna")
    assert (found.slower, found.faster) == (1024, 4096)
    assert break_even(make_rows(dense=(10, 10), gna=(1, 20)), "gna").tokens is None


def test_summary_states_that_there_is_no_break_even():
    result = Speed(Plan(), CPU, FLOAT, make_rows(dense=(1, 10, 100), clear=(2, 20, 250, 300)))
    assert result.points["clear"].tokens is None
    assert result.sentences() == [
        "CLEAR: no break-even within the measured sizes; at 4,096 tokens it takes 2.5 times as long as dense."
    ]


def test_summary_states_faster_from_the_smallest_size():
    result = Speed(Plan(), CPU, FLOAT, make_rows(dense=(1, 10, 100), llsa=(0.5, 2, 10)))
    assert result.sentences() == [
        "LLSA: faster than dense from the smallest size on, 256 tokens; at 4,096 tokens it is 10.00 times as fast."
    ]


def test_break_even_ignores_sizes_without_both_measurements():
    assert break_even(make_rows(dense=(1,), sla=()), "sla") is None
    assert break_even(make_rows(dense=(1, 10), sla=(2, 20, 1e-9)), "sla").tokens is None


@pytest.fixture
def clocked(monkeypatch):
    """Simulated clock: a call takes ``cost(name, tokens)`` seconds."""
    state = {"now": 0.0, "cost": lambda tokens: 1e-3, "made": []}

    def once(call, device):
        tokens = call().shape[2]
        state["now"] += state["cost"](tokens)
        return None, state["cost"](tokens)

    def calls(call, device, *, samples, warm_up_ms):
        tokens = call().shape[2]
        state["now"] += (samples + 1) * state["cost"](tokens)
        state["made"].append((tokens, samples))
        return speed_times(state["cost"](tokens) * 1e3, samples)

    monkeypatch.setattr(speed, "time_once", once)
    monkeypatch.setattr(speed, "time_calls", calls)
    monkeypatch.setattr(speed.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(speed, "_MIN_PROCESSOR_SHARE", 0.0)
    return state


def speed_times(ms, samples):
    from dit_accel.bench.timing import Times

    return Times(ms, ms, ms, ms, samples, 1)


def run(plan, stop=None):
    return list(speed.measure(plan, CPU, FLOAT, stop or Stop()))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_sizes_grow_until_the_time_limit(kind, clocked):
    clocked["cost"] = lambda tokens: 1e-3 * (tokens / 256) ** 2
    rows = run(Plan(kind=kind, seconds=5, mechanisms=("gna",), heads=1, head_dim=16))
    assert clocked["now"] <= 5
    sizes = [row["tokens"] for row in rows if row["attention"] == "dense"]
    assert sizes == sorted(set(sizes)) and len(sizes) >= 3
    assert [row["attention"] for row in rows[:4]] == ["dense", "gna", "dense", "gna"]
    assert all(len(row["grid"]) == (2 if kind == "image" else 3) for row in rows)


def test_fast_calls_get_more_samples(clocked):
    clocked["cost"] = lambda tokens: 1e-3 if tokens < 1000 else 1.0
    run(Plan(seconds=10, mechanisms=("gna",), heads=1, head_dim=16))
    assert {samples for tokens, samples in clocked["made"] if tokens < 1000} == {15}
    assert {samples for tokens, samples in clocked["made"] if tokens >= 1000} == {3}


def test_slow_series_ends_and_the_others_continue(clocked, monkeypatch):
    original = speed._measure

    def slow_dense(plan, name, layout, tensors):
        clocked["cost"] = lambda tokens: (1.0 if name == "dense" else 0.01) * tokens / 256
        return original(plan, name, layout, tensors)

    monkeypatch.setattr(speed, "_measure", slow_dense)
    rows = run(Plan(seconds=12, mechanisms=("gna",), heads=1, head_dim=16))
    largest = {name: max(row["tokens"] for row in rows if row["attention"] == name) for name in ("dense", "gna")}
    assert largest["dense"] == 256 < largest["gna"]


def test_out_of_memory_ends_the_series_with_a_message(clocked, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed.Case, "call", full)
    clocked["cost"] = lambda tokens: 1e-3 * (tokens / 256) ** 2
    plan = Plan(seconds=5, mechanisms=("sla",), heads=1, head_dim=16)
    result = Speed(plan, CPU, FLOAT, run(plan))
    failed = [row for row in result.rows if row["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["attention"] == "sla"
    assert result.sentences() == ["SLA: out of memory at 256 tokens."]
    assert len(result.rows) > 2
    result.figure()


def test_busy_machine_gives_a_warning():
    rows = make_rows(dense=(1, 10, 100), sla=(4, 20, 50))
    for row, share in zip(rows, (0.1, 0.5, 0.6, 1, 1, 1), strict=True):
        row["cpu_share"] = share
    result = Speed(Plan(), CPU, FLOAT, rows)
    assert "got 55 % of the available processor time" in result.sentences()[-1]
    assert result.content()["processor_share"] == pytest.approx(0.55)
    for row in rows:
        row["cpu_share"] = 0.95
    assert len(result.sentences()) == 1


def test_stop_ends_between_measurements(clocked):
    stop = Stop()
    rows = speed.measure(Plan(), CPU, FLOAT, stop)
    next(rows)
    stop.set()
    with pytest.raises(Cancelled):
        next(rows)


def test_series_share_tensors_and_sla_has_its_projection(clocked, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "_time", lambda call, device: seen.append(call) or speed_times(1.0, 3).as_row())
    next_rows = speed.measure(Plan(head_dim=16), CPU, FLOAT, Stop())
    for _ in range(5):
        next(next_rows)
    tensors = seen[0].args
    for call in seen[1:]:
        assert all(a is b for a, b in zip(call.args[0], tensors, strict=True))
    assert set(seen[1].args[1]) == {"weight", "bias"}
    assert torch.equal(seen[0](), F.scaled_dot_product_attention(*tensors))
    full = Plan(head_dim=16, share=0.9)
    assert speed._case(full, "gna", speed.TokenLayout((16, 16))).fraction > 0.8


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_share_of_the_logits_is_close_to_the_plan(kind, share):
    """For grids large enough for windows and blocks of this share. LLSA has a fixed number of blocks."""
    layout = list(speed._layouts(Plan(kind=kind), FLOAT))[4]
    for name in ("sla", "clear", "gna"):
        assert speed._case(Plan(kind=kind, share=share), name, layout).fraction == pytest.approx(share, rel=0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "from 1 to 64"),
        ({"heads": 1.5}, "give an integer, got 1.5"),
        ({"head_dim": 1000}, "from 16 to 256"),
        ({"share": 0.0}, "Share of the logits"),
        ({"share": None}, "Share of the logits"),
        ({"seconds": 1e9}, "from 5 to 600"),
        ({"kind": "audio"}, "image, video"),
        ({"mechanisms": ()}, "at least one"),
        ({"mechanisms": ("full",)}, "Unknown mechanism 'full'"),
    ],
)
def test_invalid_plan_raises_a_clear_error(change, message):
    with pytest.raises(BadInput, match=message):
        run(Plan(**change))


def test_memory_of_the_tensors_is_bounded():
    largest = list(speed._layouts(Plan(heads=64, head_dim=256), FLOAT))[-1]
    assert 4 * largest.seq_len * 64 * 256 * 4 <= 2 << 30


def test_result_is_saved_as_picture_and_data(tmp_path):
    plan = Plan(mechanisms=("sla", "gna"))
    result = Speed(plan, CPU, FLOAT, make_rows(dense=(1, 10, 100), sla=(4, 20, 50), gna=(4, 40, 400)), "complete")
    picture, data = result.save(tmp_path)
    content = json.loads(data.read_text())
    assert content["rows"] == result.rows and content["status"] == "complete"
    assert content["break_even"]["sla"]["tokens"] == pytest.approx(2048)
    assert content["break_even"]["gna"]["tokens"] is None
    assert content["machine"]["device"] == "cpu" and content["versions"]["torch"] and content["date"]
    assert content["plan"]["share"] == 0.1
    assert Image.open(picture).size[0] > 1000
    assert sorted(file.name for file in data.parent.iterdir()) == ["speed.json", "speed.png"]
    assert result.save(tmp_path)[0] != picture  # each result has its own folder


def test_failed_save_leaves_no_files(tmp_path, monkeypatch):
    result = Speed(Plan(), CPU, FLOAT, make_rows(dense=(1,)))
    monkeypatch.setattr(Speed, "figure", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_measurement_on_this_machine():
    plan = Plan(heads=1, head_dim=16, seconds=5, mechanisms=("clear",))
    rows = [row for row, _ in zip(speed.measure(plan, CPU, FLOAT, Stop()), range(4), strict=False)]
    assert [row["attention"] for row in rows] == ["dense", "clear", "dense", "clear"]
    assert all(0 < row["least"] <= row["ms"] and row["samples"] >= 3 for row in rows)
    assert all(0 < row["cpu_share"] < 1.2 for row in rows)
