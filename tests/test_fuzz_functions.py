"""Random calls of the public functions, output and gradients, against the oracle.

By default a fixed number of fixed cases. ``--fuzz-minutes N`` draws new ones for N minutes, ``--fuzz-seed S`` from
seed S on. What fails is printed as a line to run again.
"""

import shlex
import time
from dataclasses import replace

import fuzz_functions
import pytest
import sweep
import torch
from fuzz_functions import check, draw

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore"),
]
CASES, PARTS = 48, 8  # about a minute on one core


def pytest_generate_tests(metafunc):
    """Fixed seeds in parts that may run side by side, or one test for all the minutes."""
    if "seeds" not in metafunc.fixturenames:
        return
    minutes, seed = (metafunc.config.getoption(name) for name in ("--fuzz-minutes", "--fuzz-seed"))
    if minutes is None:
        first = 0 if seed is None else seed
        step = CASES // PARTS
        parts = [range(first + i * step, first + (i + 1) * step) for i in range(PARTS)]
        chosen = sweep.keep(parts, lambda part: part.start < first + CASES * 5 // 8)
        return metafunc.parametrize("seeds", chosen, ids=lambda part: f"{part.start}-{part.stop - 1}")
    first = int(time.time()) % 10**6 * 1000 if seed is None else seed
    marks = pytest.mark.timeout(60 * minutes + 600)
    metafunc.parametrize("seeds", [pytest.param(range(first, first + 10**9), marks=marks)], ids=[f"from {first}"])


def test_a_printed_case_is_the_case():
    for seed in range(200):
        assert eval(repr(draw(seed)), vars(fuzz_functions)) == draw(seed)


def test_ties_are_not_passed_over():
    case = next(case for case in map(draw, range(100)) if case.name == "llsa" and case.options["topk"] < 2)
    with pytest.raises(AssertionError, match="no tensors without a tie in 50 attempts"):
        check(replace(case, grid=(4, 4), mask="none", size=0.0, backend="torch"))


def test_functions_agree_with_the_oracle(seeds, request, capsys):
    minutes = request.config.getoption("--fuzz-minutes")
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    n_cases = n_redrawn = 0
    for seed in seeds:
        if time.monotonic() > end:
            break
        case = draw(seed)
        try:
            n_redrawn += check(case)
        except Exception as error:
            code = shlex.quote(f"from fuzz_functions import *; check({case!r})")
            again = f"PYTHONPATH=.:tests TRITON_INTERPRET=1 python -c {code}"
            pytest.fail(f"after {n_cases} cases, seed {seed}: {type(error).__name__}: {error}\n{again}")
        n_cases += 1
    with capsys.disabled():
        print(f"\n{n_cases} cases from seed {seeds.start}, tensors drawn again {n_redrawn} times", flush=True)
