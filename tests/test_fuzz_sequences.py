"""Random sequences of installing, contexts, loading, fusing and resetting, each step against a model of what is there.

A failure prints the shortest sequence found, as code to paste. Longer runs, with fresh seeds:
``pytest tests/test_fuzz_sequences.py --fuzz-minutes 30 --fuzz-seed 7``.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.utils import logging
from fuzz_families import FAMILIES, PROCESSORS, UNETS, UNKNOWN
from fuzz_host import FullWorld
from fuzz_world import Fault, MayBeRefused

Operation = tuple[Any, ...]  # (name, keyword arguments), a context with its body as a third
SEQUENCES = {
    "flux": 15, "sd3": 15, "sd15": 10, "sdxl": 7, "wan": 25, "wan_i2v": 18, "wan_vace": 16, "sd3_single": 20,
    "pixart": 25,
}  # fmt: skip
LENGTH = 9
REFUSED = (
    "no layers", "unknown layer", "unknown word", "predicate of nothing", "bad expression", "layers is a number",
    "layout is a tuple", "not a processor", "processor class", "not a model", "no host for linfusion",
)  # fmt: skip
WEIGHTS = {
    "set": 6, "attention": 5, "reset": 4, "load": 4, "save": 2, "set_dict": 2, "set_host": 1, "learn": 1,
    "set_refused": 1, "load_refused": 1, "describe": 1, "fuse_qkv": 2, "unfuse_qkv": 2, "lora_add": 2, "lora_fuse": 2,
    "lora_unfuse": 1, "lora_unload": 1, "lora_delete": 1, "lora_switch": 1, "copy": 2, "train": 1,
    "float32_and_back": 1, "checkpointing": 1, "backward": 1, "forward": 2, "forward_that_raises": 1, "threads": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def where(family: str, rng: random.Random) -> dict[str, Any]:
    """Random processor, layers and layout."""
    layout = None
    if family in UNKNOWN or (family not in UNETS and rng.random() < 0.25):
        layout = rng.choice(["native", "flat", "turned", "turned", "fixed", *(["wrong"] if rng.random() < 0.3 else [])])
    layers = rng.choice([None, None, [0], [0, 1], [1, 2, 3], [-1], "s.0", "s.1", "attn"])
    return {"processor": rng.choice(list(PROCESSORS)), "layers": layers, "layout": layout}


def arguments(name: str, family: str, rng: random.Random) -> dict[str, Any]:
    """Random arguments of an operation."""
    slot = rng.choice(["a", "b"])
    drawn: dict[str, Callable[[], dict[str, Any]]] = {
        "set": lambda: where(family, rng),
        "attention": lambda: {**where(family, rng), "leave": rng.choice(["normally", "raising"])},
        "set_dict": lambda: {**where(family, rng), "fresh": rng.random() < 0.5},
        "learn": lambda: {"seed": rng.randrange(100)},
        "set_refused": lambda: {"case": rng.choice(REFUSED)},
        "save": lambda: {"slot": slot},
        "load": lambda: {"slot": rng.choice([slot, "sparse", "host", "host", "lora"])},
        "load_refused": lambda: {"case": rng.choice(["missing", "damaged"])},
        "copy": lambda: {"how": rng.choice(["deepcopy", "pickle"]), "go_on": rng.random() < 0.5},
        "train": lambda: {"mode": rng.random() < 0.5},
        "checkpointing": lambda: {"on": rng.random() < 0.7},
        "backward": lambda: {"sizes": rng.choice([(0,), (0, 1), (1, 2)])},
        "forward": lambda: {
            "size": rng.randrange(3),
            "mode": rng.choice(["no_grad", "inference", "inference", "grad"]),
        },
        "forward_that_raises": lambda: {"where": rng.choice(["input", "layer"])},
        "threads": lambda: {"sizes": rng.choice([(0, 1), (1, 2)])},
    }
    chosen = drawn.get(name, dict)()
    if name == "set_dict":
        del chosen["layout"]
    return {key: value for key, value in chosen.items() if value is not None}


def sequence(family: str, rng: random.Random, length: int = LENGTH, depth: int = 0) -> list[Operation]:
    """Random operations; contexts hold some of them."""
    operations: list[Operation] = []
    while length > 0:
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        length -= 1
        if name != "attention":
            operations.append((name, arguments(name, family, rng)))
        elif depth < 3:
            inside = rng.randint(0, length)
            length -= inside
            body = sequence(family, rng, inside, depth + 1)
            operations.append((name, arguments(name, family, rng), body))
    return operations


def play(world: FullWorld, operations: list[Operation]) -> None:
    for name, given, *body in operations:
        if name == "attention":
            with world.attention(**given):
                play(world, body[0])
        else:
            getattr(world, name)(**given)


def fault_of(family: str, operations: list[Operation], world: type[FullWorld] = FullWorld) -> Fault | None:
    """The invariant that the sequence breaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            play(world(family), operations)
        except MayBeRefused:
            return None
        except Fault as fault:
            return fault
    return None


def shorter(operations: list[Operation]) -> Iterator[list[Operation]]:
    """The sequence without half of its operations, without one, or with a context's body in its place."""
    half = len(operations) // 2
    if half > 1:
        yield operations[:half]
        yield operations[half:]
    for i, (name, given, *body) in enumerate(operations):
        yield operations[:i] + operations[i + 1 :]
        if body:
            yield operations[:i] + body[0] + operations[i + 1 :]
            for inner in shorter(body[0]):
                yield [*operations[:i], (name, given, inner), *operations[i + 1 :]]
            if given.get("leave") == "raising":
                yield [*operations[:i], (name, {**given, "leave": "normally"}, body[0]), *operations[i + 1 :]]


def shrink(family: str, operations: list[Operation], kind: str, world: type[FullWorld] = FullWorld) -> list[Operation]:
    """Drop operations while the same kind of fault is left."""
    for candidate in shorter(operations):
        fault = fault_of(family, candidate, world)
        if fault is not None and fault.kind == kind:
            return shrink(family, candidate, kind, world)
    return operations


def code(family: str, operations: list[Operation]) -> str:
    """The sequence as Python, to be run with tests/ on the path."""

    def lines(operations: list[Operation], indent: str) -> Iterator[str]:
        for name, given, *body in operations:
            call = f"world.{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
            if body:
                yield f"{indent}with {call}:"
                yield from lines(body[0], indent + "    ") if body[0] else [f"{indent}    pass"]
            else:
                yield indent + call

    return "\n".join(["from fuzz_host import FullWorld", f"world = FullWorld({family!r})", *lines(operations, "")])


def fail_with(family: str, operations: list[Operation], fault: Fault) -> None:
    short = shrink(family, operations, fault.kind)
    again = fault_of(family, short)
    pytest.fail(f"{family}: {again or fault}\n\n{code(family, short)}\n", pytrace=False)


def context(processor: str, body: list[Operation], **given: Any) -> Operation:
    return ("attention", {"processor": processor, **given}, body)


def step(name: str, **given: Any) -> Operation:
    return (name, given)


RESET, FUSE, UNFUSE = step("reset"), step("fuse_qkv"), step("unfuse_qkv")
SPARSE, HOST = step("set", processor="gna3"), step("load", slot="host")
MERGED = [step("lora_add"), step("lora_fuse")]
DIRECTED: dict[str, tuple[str, list[Operation]]] = {
    "context with another layout": (
        "flux", [step("set", processor="gna3", layout="flat"), context("clear2", [], layout="turned")]
    ),
    "context with a layout over the model's own": ("wan", [SPARSE, context("clear2", [], layout="flat")]),
    "context with a layout on some layers": ("flux", [SPARSE, context("clear2", [], layers=[0], layout="turned")]),
    "host weights loaded in a context": ("flux", [step("set", processor="sla_all"), context("sla_all", [HOST])]),
    "host weights loaded over others in a context": ("sd15", [HOST, context("sla_all", [step("load", slot="lora")])]),
    "reset in a context": ("flux", [SPARSE, context("clear2", [RESET])]),
    "reset and set in a context": ("flux", [SPARSE, context("clear2", [RESET, step("set", processor="clear2")])]),
    "reset and load in a context": (
        "sd15", [step("set", processor="gna3", layers=[0]), context("clear2", [RESET, HOST], leave="raising")]
    ),
    "reset of host weights in a context": ("wan", [HOST, context("clear2", [RESET])]),
    "unfuse after reset": ("sd3_single", [SPARSE, FUSE, RESET, UNFUSE]),
    "unfuse after reset of a U-Net": ("sd15", [SPARSE, FUSE, RESET, UNFUSE]),
    "unfuse in a context": ("sd15", [FUSE, context("gna3", [UNFUSE])]),
    "set between fuse and unfuse": ("sd3_single", [SPARSE, FUSE, RESET, SPARSE, UNFUSE, RESET]),
    "LoRA fused over host weights": ("flux", [HOST, *MERGED, RESET, step("lora_unfuse")]),
    "host weights loaded after a reset in a context": ("flux", [context("sla_all", [RESET, HOST])]),
    "LoRA fused in a context": ("wan", [context("sla_all", [HOST, *MERGED]), step("lora_unfuse")]),
    "host weights loaded over fused projections": ("flux", [FUSE, HOST]),
    "host weights of fused projections reset": ("flux", [HOST, FUSE, RESET, UNFUSE]),
    "host weights loaded after unfusing": ("sd3_single", [FUSE, UNFUSE, HOST]),
    "host weights loaded over a fused U-Net": ("sd15", [FUSE, HOST, UNFUSE]),
    "two sizes in two threads": ("flux", [SPARSE, step("threads")]),
    "two sizes in two threads of a U-Net": ("sd15", [SPARSE, step("threads")]),
    "inference mode": ("flux", [SPARSE, step("forward", size=0, mode="inference")]),
    "inference mode, then a backward": ("wan", [SPARSE, step("forward", size=0, mode="inference"), step("backward")]),
    "pickle with a layout by hand": (
        "pixart", [step("set", processor="gna3", layout="fixed"), step("copy", how="pickle")]
    ),
    "file of a layout by hand": ("pixart", [SPARSE, step("save", slot="a"), step("load", slot="a")]),
    "two layouts by hand": (
        "pixart",
        [step("set", processor="gna3", layers=[i], layout=layout) for i, layout in enumerate(["native", "flat"])],
    ),
    "dense_steps in a context": ("flux", [SPARSE, context("clear_late", [])]),
    "dense_steps outside a context": ("flux", [step("set", processor="clear_late"), context("gna3", [])]),
    **{f"refused: {case}": ("flux", [SPARSE, step("set_refused", case=case)]) for case in REFUSED},
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTED)
def test_directed_sequence(name):
    family, operations = DIRECTED[name]
    fault = fault_of(family, operations)
    if fault is not None:
        fail_with(family, operations, fault)


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.sweep)], ids=["", "more"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_sequences_leave_what_they_should(family, part, request):
    """One half of the fixed sequences each; with ``--fuzz-minutes`` new ones."""
    minutes, seed = request.config.getoption("--fuzz-minutes"), request.config.getoption("--fuzz-seed") or 0
    stop = None if minutes is None else time.monotonic() + 60 * minutes / (2 * len(FAMILIES))
    number = 0
    while number < (SEQUENCES[family] + 1) // 2 if stop is None else time.monotonic() < stop:
        operations = sequence(family, random.Random(f"{family} {seed} {2 * number + part}"))
        fault = fault_of(family, operations)
        if fault is not None:
            fail_with(family, operations, fault)
        number += 1


def test_shrinking_keeps_the_fault_and_drops_the_rest():
    rest = [step("learn", seed=1), step("save", slot="a"), step("forward", size=1)]
    broken = [step("train"), SPARSE, *rest, context("clear2", [step("describe"), step("break_it"), RESET]), *rest]
    kind = "weights differ from the twin's"
    assert fault_of("wan", broken, Broken).kind == kind
    assert [name for name, *_ in shrink("wan", broken, kind, Broken)] == ["break_it"]
    assert fault_of("wan", [SPARSE, *rest], Broken) is None


class Broken(FullWorld):
    def break_it(self) -> None:
        with torch.no_grad():
            self.model.get_parameter("blocks.0.attn1.to_q.weight").mul_(1 + 1e-12)
        self.check()
