"""Search for per-layer options of a mechanism with the smallest error of the untrained student at a fixed cost.

    python -m dit_accel.demo.training.search_layer_options image --attn gna:window=18x18 \\
        --samples conversions/image/samples --out gna.json

The cost is the share of the logits over all layers, by default a tenth. Layers need different windows and numbers of
keys: some attend along a whole row, some to the same place in all frames, some to few keys. The search is a random
local search on encoded training samples of ``convert``: each round tries other options in each layer and applies the
best change of one or two layers within the cost. The output file holds the best options so far, in the syntax of
``--attn``, and the distance of their predictions to the dense ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.common.bundled import IMAGE, VIDEO
from dit_accel.common.files import write_json
from dit_accel.common.pipeline_loading import load_pipeline
from dit_accel.conversion.data.samples import Sample, read_sample
from dit_accel.conversion.recipes.capture import merge
from dit_accel.conversion.recipes.noise import noise_process
from dit_accel.install.installation import denoisers, installed_layers, reset_attn_processor, set_by_layer
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.attn_spec import AttentionSpec, join_options, parse_attention
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor
from dit_accel.mechanisms.registry import PROCESSORS

__all__ = ["Options", "Search"]

LEVELS = (0.0625, 0.25, 0.5, 0.75, 0.9375)
Choice = tuple[int, ...]  # index into each axis of the options


class Options:
    """Search space of one layer: axes of values, and conversion of a choice to text.

    Raises: ValueError: a mechanism whose options cannot be searched.
    """

    def __init__(self, name: str, grid: Sequence[int]) -> None:
        space = PROCESSORS[name].search_space(grid)
        if space is None:
            raise ValueError(f"{name}: the mechanism has no search_space, so its options cannot be searched")
        self.name, self.space, self.axes = name, space, space.axes

    def processor(self, choice: Choice) -> AcceleratedAttnProcessor:
        return PROCESSORS[self.name](**self._chosen(choice))

    def text(self, choice: Choice) -> str:
        return join_options(self._chosen(choice))

    def _chosen(self, choice: Choice) -> dict[str, Any]:
        return self.space.to_options(*(axis[i] for axis, i in zip(self.axes, choice, strict=True)))

    def choice(self, processor: AcceleratedAttnProcessor) -> Choice:
        """Choice nearest to a processor's options.

        Raises: ValueError: options outside the search space differ from those of the search.
        """
        values = self.space.from_processor(processor)
        choice = tuple(
            min(range(len(axis)), key=lambda i: axis[i] != value if isinstance(value, tuple) else abs(axis[i] - value))
            for axis, value in zip(self.axes, values, strict=True)
        )
        nearest, searched = self.processor(choice), self.space.option
        changed = replace(processor, **{searched: getattr(nearest, searched)})
        if changed != nearest:
            raise ValueError(
                f"{self.name}: the search varies only {searched}; expected the other options as in {nearest}, got "
                f"{changed}"
            )
        return choice

    def neighbour(self, choice: Choice, rng: random.Random) -> Choice:
        """Random neighbour of a choice: one or two axes changed by at most three steps."""
        while True:
            moved = list(choice)
            for axis in rng.sample(range(len(choice)), min(len(choice), rng.choice((1, 1, 2)))):
                step = rng.choice((-3, -2, -1, 1, 2, 3))
                moved[axis] = min(max(moved[axis] + step, 0), len(self.axes[axis]) - 1)
            if tuple(moved) != choice:
                return tuple(moved)


class Search:
    """Local search of options per layer, starting from those of ``begin``."""

    def __init__(self, pipe: Any, begin: AttentionSpec, samples: Sequence[Sample], share: float, seed: int) -> None:
        self.pipe, self.name, self.share, self.rng = pipe, begin.name, share, random.Random(seed)
        (self.model,) = denoisers(pipe).values()
        self.arguments = self._arguments(samples)
        self.dense = self._predict()
        (processors,) = set_by_layer(pipe, begin.by_layer(begin.processor())).values()
        self.layouts = self._layouts()
        layout = next(iter(self.layouts.values()))
        self.options = Options(self.name, layout.grid)
        self.shares: dict[tuple[Choice, TokenLayout], float] = {}
        self.choices = {name: self.options.choice(layer) for name, layer in processors.items()}
        if self.cost(self.choices) > share:
            raise ValueError(
                f"expected at most {share:.2%} of the logits (--share), got {self.cost(self.choices):.2%} for "
                f"{self.text(self.choices)}: start from options with a lower cost"
            )
        self.loss = self.measure(self.choices)

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments of one call of the denoiser with each sample at each noise level."""
        process, device = noise_process(self.pipe.scheduler), next(self.model.parameters()).device
        chosen = [sample for sample in samples for _ in LEVELS]
        levels = torch.tensor(LEVELS, device=device).repeat(len(samples))
        clean = torch.cat([sample.latents for sample in chosen]).to(device)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(device)
        noisy, _ = process.mix(clean, noise, levels)
        conditions = merge([sample.conditions for sample in chosen])
        conditions.tensors = {key: x.to(device) for key, x in conditions.tensors.items()}
        return conditions.arguments(noisy, process.timestep(levels))

    @torch.no_grad()
    def _predict(self) -> Tensor:
        device = next(self.model.parameters()).device
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            return self.model(**self.arguments)[0].float()

    def _layouts(self) -> dict[str, TokenLayout]:
        """Layout of each layer, recorded in one forward pass. Removes the installed processors."""
        self._predict()
        found = {name: layer.slot.last for name, layer in installed_layers(self.model).items()}
        reset_attn_processor(self.pipe)
        return {name: layout for name, layout in found.items() if layout is not None}

    def _cost(self, choice: Choice, layout: TokenLayout) -> float:
        """Share of the logits in one layer."""
        if (choice, layout) not in self.shares:
            self.shares[choice, layout] = self.options.processor(choice).layer_logits(layout) / layout.seq_len**2
        return self.shares[choice, layout]

    def cost(self, choices: Mapping[str, Choice]) -> float:
        """Share of the logits over all layers."""
        return sum(self._cost(choice, self.layouts[name]) for name, choice in choices.items()) / len(choices)

    def measure(self, choices: Mapping[str, Choice]) -> float:
        """Mean squared error of the predictions against the dense ones."""
        spec = parse_attention(self.text(choices))
        set_by_layer(self.pipe, spec.by_layer(spec.processor()))
        try:
            return float((self._predict() - self.dense).square().mean())
        finally:
            reset_attn_processor(self.pipe)

    def text(self, choices: Mapping[str, Choice]) -> str:
        """Choices in the syntax of ``--attn``: the most frequent options, then the exceptions."""
        layers: dict[str, list[str]] = {}
        for name, choice in choices.items():
            layers.setdefault(self.options.text(choice), []).append(name)
        most_common = max(layers, key=lambda options: len(layers[options]))
        parts = [f"{self.name}:{most_common}"]
        for options, names in layers.items():
            if options == most_common:
                continue
            differ = ",".join(part for part in options.split(",") if part not in most_common.split(","))
            stems: dict[str, list[str]] = {}
            for name in names:
                stem, number, _ = re.split(r"\.(\d+)\.", name, maxsplit=1)
                stems.setdefault(stem, []).append(number)
            for stem, numbers in stems.items():
                which = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
                parts.append(rf"{differ}@\.{stem}\.{which}\.")
        return ";".join(parts)

    def round(self, finished: Callable[[], bool]) -> bool:
        """Try two other choices per layer and apply the best one or pair. Returns: True if the loss decreased."""
        changes: list[tuple[float, float, str, Choice]] = []  # change of loss, change of cost, layer, choice
        for name in self.layouts:
            for _ in range(2):
                if finished():
                    return False
                choice = self.options.neighbour(self.choices[name], self.rng)
                cost = self._cost(choice, self.layouts[name]) - self._cost(self.choices[name], self.layouts[name])
                loss = self.measure({**self.choices, name: choice}) - self.loss
                changes.append((loss, cost / len(self.layouts), name, choice))
        slack = self.share - self.cost(self.choices)
        moves = [(a[0], {a[2]: a[3]}) for a in changes if a[1] <= slack]
        moves += [
            (a[0] + b[0], {a[2]: a[3], b[2]: b[3]})
            for i, a in enumerate(changes)
            for b in changes[:i]
            if a[2] != b[2] and a[1] + b[1] <= slack
        ]
        for guess, move in sorted(moves, key=lambda each: each[0])[:4]:
            if guess >= 0:
                return False
            tried = {**self.choices, **move}
            loss = self.measure(tried)
            if loss < self.loss:
                self.choices, self.loss = tried, loss
                return True
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("image", "video"))
    parser.add_argument("--pipeline", type=Path, help="folder of the pipeline; default the embedded one")
    parser.add_argument("--attn", metavar="SPEC", type=parse_attention, required=True, help="initial options")
    parser.add_argument("--samples", type=Path, required=True, help="folder of encoded samples")
    parser.add_argument("--count", type=int, default=4, help="number of samples")
    parser.add_argument("--share", type=float, default=0.0995, help="maximum share of the logits")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = args.pipeline or (VIDEO if args.kind == "video" else IMAGE).folder
    paths = sorted(args.samples.glob("*.safetensors"))[: args.count]
    if not paths:
        parser.error(f"no encoded samples in {args.samples}: pass the folder samples of a conversion")
    samples = [read_sample(path) for path in paths]
    pipe = load_pipeline(str(folder), torch.float32, device)
    try:
        search = Search(pipe, args.attn, samples, args.share, args.seed)
    except ValueError as error:
        parser.error(str(error))
    rounds = 0
    while time.monotonic() < end:
        better = search.round(lambda: time.monotonic() >= end)
        rounds += 1
        if better or rounds == 1:
            result = {"attention": search.text(search.choices), "share": search.cost(search.choices)}
            write_json(args.out, {**result, "distance": search.loss, "rounds": rounds})
            print(json.dumps({**result, "distance": search.loss, "rounds": rounds}), flush=True)


if __name__ == "__main__":
    main()
