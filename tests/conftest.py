"""Test set-up: no access to the hub, one thread per worker, and GPU tests only on a GPU (see the report header)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIT_ACCEL_AUTOTUNE"] = "0"  # tests of autotuning set it themselves
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, also in subprocesses
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():  # Triton reads the variable when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
    if "PLAIN_INTERPRETER" not in os.environ:  # make test-all sets it
        import fast_interpreter

        fast_interpreter.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

collect_ignore = ["browser"] if torch.cuda.is_available() else ["browser", "gpu"]  # browser: make test-browser


def pytest_addoption(parser) -> None:
    group = parser.getgroup("fuzz", "random cases; without options a fixed number of fixed ones")
    group.addoption("--fuzz-minutes", type=float, help="let each fuzz draw new cases for this many minutes")
    group.addoption("--fuzz-seed", type=int, help="seed of the first case; with --fuzz-minutes default the time of day")


def pytest_report_header() -> str:
    gpu = "collected" if torch.cuda.is_available() else "not collected, torch sees no GPU"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads; tests/gpu: {gpu}"
