"""Requests of ``dit-accel bench`` at tiny sizes on the CPU."""

import torch

from dit_accel.bench.request import make_request

CPU = torch.device("cpu")
TRIAL = ["--device", "cpu", "--smoke", "--repeats", "2"]


class Silent:
    """Progress that shows nothing."""

    def doing(self, what):
        pass

    say = done = doing


def make_trial(folder, names):
    rest = {"repeats": 2, "seed": 0, "keep": None, "command": ("test",), "names": names}
    return make_request("cpu", None, True, folder / "out.json", **rest)
