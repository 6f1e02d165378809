"""A model that operations are run on, and what should be true of it after each: see test_fuzz_sequences.py."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_families import (
    FUSED_BY_PROCESSOR,
    PROCESSORS,
    SIZES,
    UNKNOWN,
    ExpectedAttention,
    Installed,
    WrongLayout,
    in_dtype,
    inputs_of,
    layout_argument,
    native_layers,
)
from fuzz_models import SavedFile, draw, folder, prepared, template_of
from torch import Tensor, nn

import dit_accel
from dit_accel.install.installation import installation_of, installed_layers

REFUSALS = (ValueError, TypeError, RuntimeError)
OURS = ".dit_accel."


class Fault(Exception):
    """An invariant that does not hold. kind: short, the same for each occurrence of one fault."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class Left(Exception):
    """Leaves a context by an exception."""


class MayBeRefused(Exception):
    """An operation was refused that may be, on leaving a context: what follows is not known."""


@dataclass
class Host:
    """Host weights that loads have written over: what was there before."""

    before: dict[str, Tensor] = field(default_factory=dict)
    loaded: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> Host:
        return Host(dict(self.before), dict(self.loaded))

    def add(self, deltas: dict[str, Tensor]) -> None:
        for values in (self.before, self.loaded):
            for key in values.keys() & deltas.keys():
                values[key] = values[key] + deltas[key]


_OUTPUTS: dict[tuple[Any, ...], Tensor | None] = {}  # shared by all sequences: most states occur again


class World:
    """A float64 model that is installed on, a twin that never is, and what the twin's attention has to be.

    Each public method is one operation. It runs on the model; if it belongs to the host, on the twin as well; then
    :meth:`check` compares everything. A method whose preconditions do not hold does nothing.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.model, self.twin = template_of(family)(), template_of(family)()
        self.layers = native_layers(self.twin)
        self.expected = ExpectedAttention(family, self.twin)
        self.spec: dict[str, Installed] = {}
        self.host = Host()
        self.files = dict(prepared(family))
        self.originals: dict[str, Any] | None = dict(self.model.attn_processors)
        self.open: list[tuple[dict[str, Installed], Host]] = []  # what the open contexts bring back
        self.fused = self.lora = self.merged = self.enabled = False
        self.unsure = False  # whether a forward may be refused, since the host has set other processors
        self.fused_at: dict[str, Installed] | None = None
        self.exact = True  # whether weights have to be the twin's to the bit
        self.left = False  # whether a LoRA was left in the weights
        self.baked = False  # whether that was over host weights that a load had written
        self.checkpointed = False
        self.known_dtype = torch.float64

    # ---- comparing

    def attempt(self, what: str, action: Callable[[], Any], refused: bool | None = False) -> bool:
        """Run an operation; whether it did its work. refused: whether it must be, None where it may be."""
        try:
            action()
        except REFUSALS as error:
            if not str(error):
                raise Fault(f"{what}: {type(error).__name__} without a message") from error
            if refused is False:
                raise Fault(f"{what} was refused", f"{type(error).__name__}: {error}") from error
            return False
        except (Fault, Left):
            raise
        except Exception as error:
            raise Fault(f"{what} raised {type(error).__name__}", str(error)) from error
        if refused:
            raise Fault(f"{what} was not refused")
        return True

    def output(self, size: int) -> Tensor | None:
        """What a forward of this size gives; None if it must be refused."""
        key = (size, *self._state_key())
        if not self.left and key in _OUTPUTS:
            return _OUTPUTS[key]
        self.expected.spec, self.expected.size = self.spec, SIZES[self.family][size]
        try:
            with torch.no_grad(), self.expected:
                output = self.twin(**self.inputs(size), return_dict=False)[0]
        except WrongLayout:
            output = None
        if not self.left:  # else it depends on more than the key
            _OUTPUTS[key] = output
        return output

    def _state_key(self) -> tuple[Any, ...]:
        """All that an expected output depends on, besides its size, while no LoRA was left in the weights."""
        spec = sorted(
            (name, x.processor, x.kind or "", 0.0 if x.bias is None else x.bias.sum().item())
            for name, x in self.spec.items()
        )
        loaded = sorted((key, value.sum().item()) for key, value in self.host.loaded.items())
        flags = (self.fused, self.lora, self.enabled, self.merged, self.twin.training, self.known_dtype)
        return self.family, *flags, tuple(spec), tuple(loaded)

    def inputs(self, size: int) -> dict[str, Any]:
        return in_dtype(inputs_of(self.family, SIZES[self.family][size]), self.known_dtype)

    def check(self) -> None:
        """All invariants, with a forward of the first size."""
        self.check_state()
        self.forward(0)

    def check_state(self) -> None:
        found = {name: layer.mechanism for name, layer in installed_layers(self.model).items()}
        wanted = {name: PROCESSORS[installed.processor] for name, installed in self.spec.items()}
        if found != wanted:
            raise Fault("other layers are installed", f"{found} instead of {wanted}")
        installation = installation_of(self.model)
        if installation is not None and hasattr(installation.steps, "counts"):
            late = any(processor.dense_steps for processor in wanted.values())
            if installation.steps.counts != late:
                raise Fault("steps.counts is stale", f"{installation.steps.counts} instead of {late}")
        self._check_weights()
        if self.spec:
            return
        if installation is not None or any(hasattr(m, "dit_accel") for m in self.model.modules()):
            raise Fault("something is left of what was installed")
        left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.modules())
        if left:
            raise Fault("hooks are left", str(left))
        processors, twins = self.model.attn_processors, self.twin.attn_processors
        if {k: type(p) for k, p in processors.items()} != {k: type(p) for k, p in twins.items()}:
            raise Fault("the processors are not the host's own")
        if self.originals is not None and not self._fused_by_processor():
            other = [name for name, processor in processors.items() if processor is not self.originals[name]]
            if other:
                raise Fault("the processors are not the same objects", other[0])

    def _check_weights(self) -> None:
        state = {key: value for key, value in self.model.state_dict().items() if OURS not in key}
        twins = self.twin.state_dict()
        if list(state) != list(twins):
            raise Fault("state_dict has other keys", f"{sorted(state.keys() ^ twins.keys())[:3]} …")
        for key, value in state.items():
            if "to_qkv" in key or "to_kv" in key or "to_added" in key:  # copies; outputs show those that are read
                continue
            if not torch.equal(value, twins[key]) and (self.exact or (value - twins[key]).abs().max() > 1e-9):
                off = (value - twins[key]).abs().max().item()
                raise Fault("weights differ from the twin's", f"{key} by {off:.2g}")

    def _fused_by_processor(self) -> bool:
        return self.fused and self.family in FUSED_BY_PROCESSOR

    def _compare(self, what: str, out: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
        if out.shape != expected.shape or not (out - expected).abs().max() <= tolerance:
            raise Fault(f"{what}: the output is wrong", f"by {(out - expected).abs().max().item():.2g}")

    def forward(self, size: int, mode: str = "no_grad", model: nn.Module | None = None) -> None:
        """A forward in "no_grad", "inference" or "grad" mode, compared with the expected one."""
        expected, outputs = self.output(size), []
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": contextlib.nullcontext}[mode]
        chosen = self.model if model is None else model

        def call() -> None:
            with context():
                outputs.append(chosen(**self.inputs(size), return_dict=False)[0])

        what = "a forward" if mode == "no_grad" else f"a forward in {mode} mode"
        tolerance = 1e-9 if self.known_dtype == torch.float64 else 1e-4
        must_be_refused = expected is None or (None if self.unsure and self.spec else False)
        if self.attempt(what, call, must_be_refused):
            self._compare(what, outputs[0].detach(), expected, tolerance)

    # ---- dit_accel's operations

    def chosen(self, layers: Any) -> list[str]:
        """Names that ``layers`` selects here: None, positions among the layers, or a word found in their names."""
        if layers is None:
            return list(self.layers)
        if isinstance(layers, str):
            return [name for name in self.layers if layers in name]
        return [self.layers[i] for i in sorted({i % len(self.layers) for i in layers})]

    def argument(self, layers: Any) -> Any:
        """What is passed as ``layers=``: for positions, names."""
        return layers if layers is None or isinstance(layers, str) else self.chosen(layers)

    def _kind(self, layout: str | None) -> str | None:
        return "native" if layout is None and self.family in UNKNOWN else layout

    def _installed(self, processor: str, layers: Any, layout: str | None) -> dict[str, Installed]:
        return {name: Installed(processor, self._kind(layout)) for name in self.chosen(layers)}

    def set(self, processor: str, layers: Any = None, layout: str | None = None) -> None:
        if not self.chosen(layers):
            return
        given = layout_argument(self.family, self._kind(layout))
        self.attempt(
            "set_attn_processor",
            lambda: dit_accel.set_attn_processor(self.model, PROCESSORS[processor], self.argument(layers), given),
        )
        self.spec = {**self.spec, **self._installed(processor, layers, layout)}
        self.unsure &= not self.spec.keys() <= set(self.chosen(layers))
        self.check()

    def set_dict(self, processor: str, layers: Any = None, fresh: bool = False) -> None:
        """diffusers' own way: a dict for all layers. fresh: new host processors where no mechanism is."""
        if self.family in UNKNOWN or self.unsure or any(i.kind for i in self.spec.values()) or not self.chosen(layers):
            return
        if self._fused_by_processor():
            return
        names = {f"{name}.processor" for name in self.chosen(layers)}
        held = {f"{name}.processor" for name in self.spec}
        new = {
            key: type(twin)() if fresh and key not in held else self.model.attn_processors[key]
            for key, twin in self.twin.attn_processors.items()
        }
        given = {key: PROCESSORS[processor] if key in names else value for key, value in new.items()}
        self.attempt("model.set_attn_processor", lambda: self.model.set_attn_processor(given))
        if self.originals is not None and fresh:
            self.originals.update({key: value for key, value in new.items() if key not in names | held})
        self.spec = {**self.spec, **self._installed(processor, layers, None)}
        self.check()

    def set_host(self) -> None:
        """The user's own processor on all layers, behind dit_accel's back."""
        if self._fused_by_processor() or len({type(p) for p in self.twin.attn_processors.values()}) > 1:
            return
        processor = type(next(iter(self.twin.attn_processors.values())))()
        self.model.set_attn_processor(processor)
        self.unsure = bool(self.spec)
        if self.originals is not None:
            self.originals = dict.fromkeys(self.originals, processor)
        self.check()

    def learn(self, seed: int) -> None:
        """Write into the learned parameters, as training does."""
        for number, (name, installed) in enumerate(self.spec.items()):
            if installed.processor == "sla_all":
                bias = installed_layers(self.model)[name].bias
                installed.bias = draw(seed + number, bias.shape)
                with torch.no_grad():
                    bias.copy_(installed.bias)
        self.check()

    def _end_if_baked(self, kept: dict[str, Tensor]) -> None:
        """End the sequence if a LoRA is merged for good into host weights that are put back: its loss is logged."""
        if self.baked and (self.host.before or kept):
            raise MayBeRefused

    def reset(self) -> None:
        self._end_if_baked({})
        may = None if self._host_is_entangled({}) or self.open else False
        if self.attempt("reset_attn_processor", lambda: dit_accel.reset_attn_processor(self.model), may):
            self._bring_back({}, Host())
        self.check()

    @contextlib.contextmanager
    def attention(
        self, processor: str, layers: Any = None, layout: str | None = None, leave: str = "normally"
    ) -> Iterator[None]:
        """dit_accel.attention(...). leave: "normally" or "raising"."""
        before, host = dict(self.spec), self.host.copy()
        given = layout_argument(self.family, self._kind(layout))
        options = {"layers": self.argument(layers), "layout": given}
        context = dit_accel.attention(self.model, PROCESSORS[processor], **options)
        self.attempt("entering attention()", context.__enter__)
        self.spec = {**self.spec, **self._installed(processor, layers, layout)}
        self.open.append((before, host))
        try:
            self.check()
            yield
        except BaseException:
            with contextlib.suppress(BaseException):
                context.__exit__(None, None, None)
            raise
        self.open.pop()
        error = Left("leaves the context")
        arguments = (Left, error, None) if leave == "raising" else (None, None, None)
        self._end_if_baked(host.before)
        may = None if self._host_is_entangled(host.before) else False
        if not self.attempt("leaving attention()", lambda: context.__exit__(*arguments), may):
            raise MayBeRefused
        self._bring_back(before, host)
        self.check()

    def set_refused(self, case: str) -> None:
        """set_attn_processor with arguments that must be refused; the state stays."""
        processor = PROCESSORS["gna3"]
        layout = layout_argument(self.family, "native") if self.family in UNKNOWN else None
        for_unet = dit_accel.LinFusionAttnProcessor()
        calls: dict[str, tuple[Any, ...]] = {
            "no layers": (self.model, processor, [], layout),
            "unknown layer": (self.model, processor, [self.layers[0], "nothing"], layout),
            "unknown word": (self.model, processor, "nothing", layout),
            "predicate of nothing": (self.model, processor, lambda name: False, layout),
            "bad expression": (self.model, processor, "(", layout),
            "layers is a number": (self.model, processor, 3, layout),
            "layout is a tuple": (self.model, processor, None, (7, 10)),
            "not a processor": (self.model, "gna", None, layout),
            "processor class": (self.model, dit_accel.GNAAttnProcessor, None, layout),
            "not a model": (None, processor, None, layout),
            "no host for linfusion": (self.model, for_unet, None, layout),
        }
        if case == "no host for linfusion" and (self.family in (*UNKNOWN, "sd15", "sdxl")):
            return
        self.attempt(f"set_attn_processor, {case},", lambda: dit_accel.set_attn_processor(*calls[case]), True)
        self.check()

    def save(self, slot: str) -> None:
        path = Path(folder().name) / f"{self.family}-{id(self)}-{slot}"
        if self.attempt("save_attention", lambda: dit_accel.save_attention(self.model, path), not self.spec):
            spec = {name: copy.copy(installed) for name, installed in self.spec.items()}
            host = {key: self.twin.get_parameter(key).detach().clone() for key in self.host.before}
            self.files[slot] = SavedFile(path, spec, host)
        self.check()

    def load(self, slot: str) -> None:
        file = self.files.get(slot)
        if file is None:
            return
        entangled = bool((file.host or file.factors) and (self.fused or self.lora))
        others = any(
            PROCESSORS[self.spec[name].processor].name != PROCESSORS[new.processor].name
            for name, new in file.spec.items()
            if name in self.spec
        )
        kinds = {new.kind for new in file.spec.values()}
        if len(kinds) > 1:
            return
        given = layout_argument(self.family, *kinds)  # a function is not in the file
        refused = True if others else None if entangled else False
        load = functools.partial(dit_accel.load_attention, self.model, file.path, layout=given)
        if self.attempt("load_attention", load, refused):
            self.spec = {**self.spec, **{name: copy.copy(new) for name, new in file.spec.items()}}
            self.unsure &= not self.spec.keys() <= file.spec.keys()
            values = dict(file.host)
            for key, (down, up) in file.factors.items():
                pretrained = self.host.before.get(key, self._bare(key))
                values[key] = (pretrained.float() + up.float() @ down.float()).double()
            self._write_host(values)
        self.check()

    def load_refused(self, case: str) -> None:
        path = Path(folder().name) / "damaged.safetensors"
        path.write_bytes(b"x" * 100)
        if case == "missing":
            try:
                dit_accel.load_attention(self.model, folder().name + "/nowhere")
            except FileNotFoundError:
                pass
            else:
                raise Fault("load_attention of a missing file was not refused")
        else:
            self.attempt("load_attention of a damaged file", lambda: dit_accel.load_attention(self.model, path), True)
        self.check()

    def describe(self) -> None:
        self.attempt("describe", lambda: dit_accel.describe(self.model))
        self.attempt("logit_fraction", lambda: dit_accel.logit_fraction(self.model), None)
        self.check()

    # ---- host weights

    def _host_is_entangled(self, kept: dict[str, Tensor]) -> bool:
        """Whether host weights are to be put back that the host has meanwhile fused or merged."""
        return bool(self.host.before or kept) and (self.fused or self.merged or self.baked)

    def _bring_back(self, spec: dict[str, Installed], host: Host) -> None:
        values = {key: value for key, value in self.host.before.items() if key not in host.before}
        self._put({**values, **host.loaded})
        self.spec, self.host = dict(spec), host.copy()
        self.unsure &= bool(spec)

    def _write_host(self, values: dict[str, Tensor]) -> None:
        for key in values:
            if key not in self.host.before:
                self.host.before[key] = self._bare(key)
        self.host.loaded.update(values)
        self._put(values)

    def _bare(self, key: str) -> Tensor:
        values: list[Tensor] = []
        self._without_fusing(lambda: values.append(self.twin.get_parameter(key).detach().clone()))
        return values[0]

    def _put(self, values: dict[str, Tensor]) -> None:
        def write() -> None:
            with torch.no_grad():
                for key, value in values.items():
                    self.twin.get_parameter(key).copy_(value)

        if values:
            self._without_fusing(write)

    def _without_fusing(self, action: Callable[[], None]) -> None:
        """On the twin as it would be without fused projections and merged LoRA."""
        if self.fused:
            self.twin.unfuse_qkv_projections()
        if self.merged:
            self.twin.unfuse_lora()
        action()
        if self.merged:
            self.twin.fuse_lora()
        if self.fused:
            self.twin.fuse_qkv_projections()
