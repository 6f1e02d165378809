"""Selection of a kernel's launch configuration: table, memory, cache file, and a bounded search that logs."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dit_accel.kernels import tuning
from dit_accel.kernels.block_sparse.forward import block_sparse_attention
from dit_accel.kernels.block_sparse.plan import window_plan
from dit_accel.kernels.tuning import BUDGET_S, MAX_CONFIGS, LaunchConfig, candidate_configs, choose_config, launch_tuned
from dit_accel.kernels.windows.geometry import BallAxis

GUESS = LaunchConfig(64, 64, 4, 2)
QUERY = torch.empty(1, 1, 1, 96, dtype=torch.float16)
CANDIDATES = candidate_configs(GUESS, 2, False)


class Machine:
    """Fake GPU with the given times in seconds; other configurations do not fit."""

    def __init__(self, times: dict[LaunchConfig, float]) -> None:
        self.times, self.now, self.launched, self.timed = times, 0.0, [], 0

    def launch(self, config: LaunchConfig) -> None:
        if config not in self.times:
            raise OutOfResources(120000, 101376, "shared memory")
        self.launched.append(config)
        self.now += self.times[config]

    def milliseconds(self, call) -> float:
        before = self.now
        call()
        self.timed += 1
        return 1000 * (self.now - before)

    def run(self, what="list 64x64", guess=GUESS, query=QUERY, boxes=False) -> LaunchConfig:
        """Configuration of the last launch, whose result is kept."""
        launch_tuned(self.launch, query, what, guess, boxes)
        return self.launched[-1]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Factory of machines; each represents a separate process, with the same cache folder."""
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIT_ACCEL_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "_gpu", lambda device: "NVIDIA A10")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def start(times=None) -> Machine:
        machine = Machine(dict.fromkeys(CANDIDATES, 1.0) if times is None else times)
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_milliseconds", machine.milliseconds)
        monkeypatch.setattr(tuning, "perf_counter", lambda: machine.now)
        tuning._warn_once.cache_clear()
        return machine

    return start


def lines(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "dit_accel"]
    caplog.clear()
    return found


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("hip", [None, "7.0"])
def test_candidates_start_with_the_guess_and_keep_tiles(itemsize, boxes, hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    configs = candidate_configs(GUESS, itemsize, boxes)
    assert configs[0] == GUESS and 4 <= len(configs) == len(set(configs)) <= MAX_CONFIGS
    assert {(config.block_q, config.block_k) for config in configs} == {(64, 64)}
    assert boxes or not any(config.boxes for config in configs)
    assert not hip or not any(config.boxes or config.max_registers for config in configs)


def test_fastest_config_is_selected_once(gpu, caplog):
    machine = gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[3]: 0.4})
    assert machine.run() == CANDIDATES[3]
    assert machine.timed == len(CANDIDATES)
    first, second = lines(caplog)
    for part in (f"measuring {len(CANDIDATES)} launch configurations", "at most about 20 s", "DIT_ACCEL_AUTOTUNE=0"):
        assert part in first
    assert "NVIDIA A10" in first and "list 64x64, float16, head dim 96" in first and "tuning.json" in first
    assert str(CANDIDATES[3]) in second and "400 ms per call (untuned: 1e+03 ms)" in second
    assert machine.run() == CANDIDATES[3] and machine.timed == len(CANDIDATES) and not lines(caplog)


def test_each_kind_dtype_and_head_dim_is_tuned_separately(gpu):
    machine = gpu()
    for what, query in (("list", QUERY), ("ball", QUERY), ("list", QUERY.bfloat16()), ("list", QUERY[..., :64])):
        before = machine.timed
        machine.run(what=what, query=query)
        assert machine.timed > before


def test_small_gains_are_ignored_as_noise(gpu):
    assert gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[3]: 0.98}).run() == GUESS


def test_no_candidate_is_started_past_the_budget(gpu):
    machine = gpu(dict.fromkeys(CANDIDATES, 0.6 * BUDGET_S))
    machine.run()
    assert machine.timed == 2
    machine = gpu({GUESS: 2 * BUDGET_S})
    assert machine.run(what="slow") == GUESS and machine.timed == 1


def test_next_process_reads_the_cache_file(gpu, tmp_path, caplog):
    gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[2]: 0.5}).run()
    (key,) = json.loads((tmp_path / "tuning.json").read_text())
    assert "NVIDIA A10, triton " in key and f"kernel {tuning.KERNEL}" in key
    lines(caplog)
    machine = gpu()
    assert machine.run() == CANDIDATES[2] and machine.timed == 0 and not lines(caplog)
    assert [x.name for x in tmp_path.iterdir()] == ["tuning.json"]  # no temporary file is left


def test_concurrent_processes_keep_both_results(gpu, tmp_path, monkeypatch):
    first, second = gpu(), gpu()
    read = tuning._read

    def read_before_the_other_writes(file):
        found = read(file)
        monkeypatch.setattr(tuning, "_read", read)
        monkeypatch.setattr(tuning, "_milliseconds", second.milliseconds)
        monkeypatch.setattr(tuning, "_lock", tuning.Lock())
        second.run(what="ball")
        return found

    monkeypatch.setattr(tuning, "_read", read_before_the_other_writes)
    first.run(what="list")
    assert {key.split(": ")[1].split(",")[0] for key in json.loads((tmp_path / "tuning.json").read_text())} == {
        "list", "ball",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"a": NaN'])
def test_invalid_cache_warns_once_and_is_replaced(content, gpu, tmp_path, caplog):
    file = tmp_path / "tuning.json"
    file.write_bytes(content)
    machine = gpu()
    machine.run()
    assert sum("Ignoring" in line and str(file) in line for line in lines(caplog)) == 1
    assert len(json.loads(file.read_text())) == 1
    machine.run(what="another")
    assert not any("Ignoring" in line for line in lines(caplog))


@pytest.mark.parametrize("entry", [None, 3, {}, {"config": {"num_warps": 3}}, {"config": [1]}])
def test_invalid_cache_entries_are_measured_again(entry, gpu, tmp_path):
    gpu().run()
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), entry)))
    machine = gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[1]: 0.5})
    assert machine.run() == CANDIDATES[1] and machine.timed == len(CANDIDATES)


def test_unwritable_folder_warns_once(gpu, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "file" / "folder"))
    machine = gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[1]: 0.5})
    assert machine.run() == CANDIDATES[1]
    machine.run(what="another")
    assert sum("Cannot store" in line for line in lines(caplog)) == 1


def test_configs_that_do_not_fit_are_skipped(gpu, caplog):
    machine = gpu({GUESS: 1.0, CANDIDATES[4]: 0.5})
    assert machine.run() == CANDIDATES[4] and machine.timed == 2
    machine = gpu({CANDIDATES[5]: 0.5})  # not even the guess fits
    assert machine.run(what="tight") == CANDIDATES[5]
    assert "untuned: does not fit" in lines(caplog)[-1]
    with pytest.raises(OutOfResources):
        gpu({}).run(what="nothing fits")


def test_guess_replaces_a_tuned_config_that_does_not_fit(gpu):
    machine = gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[3]: 0.4})
    assert machine.run() == CANDIDATES[3]
    del machine.times[CANDIDATES[3]]
    assert machine.run() == machine.run() == GUESS
    del machine.times[GUESS]
    with pytest.raises(OutOfResources):
        machine.run()


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_disabled_autotuning_uses_the_guess_and_writes_nothing(value, gpu, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DIT_ACCEL_AUTOTUNE", value)
    machine = gpu()
    assert machine.run() == GUESS and machine.launched == [GUESS] and not machine.timed
    assert not lines(caplog) and not list(tmp_path.iterdir())


def test_graph_capture_uses_known_configs_and_times_none(gpu, monkeypatch):
    machine = gpu({config: 1.0 for config in CANDIDATES} | {CANDIDATES[3]: 0.4})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert machine.run() == GUESS and machine.launched == [GUESS] and not machine.timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert machine.run() == CANDIDATES[3]  # the guess was not kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert machine.run() == CANDIDATES[3]


def test_unavailable_descriptors_are_not_candidates(gpu):
    guess = replace(GUESS, boxes=True)
    machine = gpu(dict.fromkeys([*CANDIDATES, *candidate_configs(guess, 2, True)], 1.0))
    assert not machine.run(guess=guess).boxes
    assert machine.run(what="with boxes", guess=guess, boxes=True).boxes


def test_no_autotuning_off_the_gpu(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path))
    monkeypatch.delenv("DIT_ACCEL_AUTOTUNE", raising=False)
    machine = Machine({GUESS: 1.0})
    assert machine.run() == GUESS and machine.launched == [GUESS] and not list(tmp_path.iterdir())


def test_folders_follow_the_environment(monkeypatch):
    for name in ("DIT_ACCEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuning._cache_file()) == "/home/someone/.cache/dit_accel/tuning.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(tuning._cache_file()) == "/caches/dit_accel/tuning.json"
    monkeypatch.setenv("DIT_ACCEL_CACHE", "~/mine")
    assert str(tuning._cache_file()) == "/home/someone/mine/tuning.json"


class OnGpu:
    """Stand-in for a GPU tensor in choose_config."""

    device = torch.device("cuda", 0)

    def __init__(self, dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (1, 1, 1, dim), dtype

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize(
    "capability, kib, dim, known, tile",
    [((9, 0), 227, 128, True, 128), ((9, 0), 227, 96, False, 128), ((10, 0), 227, 128, False, 128),
     ((12, 0), 99, 128, False, 64), ((8, 6), 99, 128, False, 64), ((8, 0), 163, 64, False, 64)],
)  # fmt: skip
def test_table_applies_only_to_measured_cases(capability, kib, dim, known, tile, monkeypatch):
    """Blackwell RTX cards have 99 KiB of shared memory: the H100's tiles would not fit."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = types.SimpleNamespace(shared_memory_per_block_optin=kib * 1024, shared_memory_per_block=48 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for kind in ("list", "interval", "ball"):
        assert (tuning.measured(OnGpu(dim), kind) is not None) == known
        assert choose_config(OnGpu(dim), kind).block_q == tile
        assert tuning.measured(OnGpu(dim, torch.float32), kind) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
def test_all_candidates_compute_the_same_result(gpu):
    """The real kernel with a fake clock: the outputs are those of the selected configuration."""
    axes = (BallAxis(9, 3, 1.0), BallAxis(13, 3, 1.0))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9 * 13, 32).half() for _ in range(3))
    plan = window_plan(axes, 9.0, 64, 64, q.device)
    want, want_lse = block_sparse_attention(q, k, v, plan, scale=0.2, return_lse=True, config=GUESS)
    machine = gpu()
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.2, return_lse=True)
    assert machine.timed >= 4 and len(tuning._chosen) == 1
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)
