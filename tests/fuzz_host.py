"""Operations of the host on the models of fuzz_world.py: fusing, LoRA, copies, dtypes, gradients and threads."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from fuzz_families import SIZES
from fuzz_world import Fault, Left, World
from peft import LoraConfig
from torch import Tensor, nn

import dit_accel

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)


class FullWorld(World):
    """All operations that a sequence consists of."""

    def both(self, what: str, action: Callable[[Any], Any]) -> None:
        """An operation of the host's, on the twin and on the model."""
        action(self.twin)
        self.attempt(what, lambda: action(self.model))

    # ---- fused projections and LoRA

    def fuse_qkv(self) -> None:
        if self.fused or self.family == "sd3":  # diffusers cannot run dual attention with fused projections
            return
        self.fused = True
        self.both("fuse_qkv_projections", lambda model: model.fuse_qkv_projections())
        if self._fused_by_processor():
            self.fused_at = None if self.unsure else dict(self.spec)
            self.unsure = bool(self.spec)
        self.check()

    def unfuse_qkv(self) -> None:
        if not self.fused:
            return
        if self._fused_by_processor():
            self.unsure = bool(self.spec) and self.fused_at != self.spec
        self.fused = False
        self.both("unfuse_qkv_projections", lambda model: model.unfuse_qkv_projections())
        self.check()

    def lora_add(self) -> None:
        if self.lora or self.fused or not hasattr(self.twin, "add_adapter"):
            return
        self.both("add_adapter", lambda model: torch.manual_seed(0) and model.add_adapter(LORA))
        self.lora = self.enabled = True
        self.check()

    def lora_switch(self) -> None:
        """Disable the adapter, or enable it again."""
        if not self.lora or self.merged:
            return
        self.enabled = not self.enabled
        self.both("disable_lora", lambda model: (model.enable_lora if self.enabled else model.disable_lora)())
        self.check()

    def lora_fuse(self) -> None:
        if not self.lora or self.merged or self.fused or not self.enabled:
            return
        self.merged, self.exact = True, False
        self.both("fuse_lora", lambda model: model.fuse_lora())
        self.check()

    def lora_unfuse(self) -> None:
        if not self.merged or self.fused:
            return
        self.merged = False
        self.both("unfuse_lora", lambda model: model.unfuse_lora())
        self.check()

    def lora_delete(self) -> None:
        """Delete the adapter, and then peft's wrappers."""
        if not self.lora or self.merged or self.fused:
            return
        self.both("delete_adapters", lambda model: (model.delete_adapters("default"), model.unload_lora()))
        self.lora = self.enabled = False
        self.check()

    def lora_unload(self) -> None:
        """Remove the adapter; if it is merged, what it has added stays in the weights."""
        if not self.lora or self.fused:
            return
        if self.merged:
            self._bake()
            self.left = True
        self.both("unload_lora", lambda model: model.unload_lora())
        self.lora = self.enabled = self.merged = False
        self.check()

    def _bake(self) -> None:
        merged = {key: self.twin.get_parameter(key).detach().clone() for key in self._weights_of_lora()}
        deltas = {key: value - self._bare(key) for key, value in merged.items()}
        for host in (self.host, *(host for _, host in self.open)):
            host.add(deltas)
        self.baked |= bool(self.host.before) or any(host.before for _, host in self.open)

    def _weights_of_lora(self) -> list[str]:
        return [f"{name}.weight" for name, module in self.twin.named_modules() if hasattr(module, "lora_A")]

    # ---- copies, modes and dtypes

    def copy(self, how: str = "deepcopy", go_on: bool = True) -> None:
        """Copy the model, see that the copy is whole and leaves the model alone. go_on: with the copy."""
        if how == "pickle" and self.checkpointed:  # diffusers keeps a local function
            return
        made: list[nn.Module] = []
        for _ in range(2):
            self.attempt(
                f"{how} of the model",
                lambda: made.append(
                    copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
                ),
            )
        self.forward(1, model=made[0])
        if not self._host_is_entangled({}):
            self.attempt("reset_attn_processor of a copy", lambda: dit_accel.reset_attn_processor(made[0]))
            left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in made[0].modules())
            if left or any(hasattr(m, "dit_accel") for m in made[0].modules()):
                raise Fault("something is left on a copy after its reset")
        if go_on and not self.open:
            self.model, self.originals = made[1], None
        self.check()

    def train(self, mode: bool = True) -> None:
        self.both("train", lambda model: model.train(mode))
        self.check()

    def float32_and_back(self) -> None:
        if not self.exact:
            return
        for dtype in (torch.float32, torch.float64):
            for model in (self.model, self.twin):
                model.to(dtype)
            self.known_dtype = dtype
            self.forward(0)
        self.check()

    def checkpointing(self, on: bool = True) -> None:
        self.checkpointed |= on
        (self.model.enable_gradient_checkpointing if on else self.model.disable_gradient_checkpointing)()
        self.check()

    # ---- forwards

    def backward(self, sizes: tuple[int, ...] = (0,)) -> None:
        """Forwards of these sizes before one backward; the gradients are those of the twin."""
        trained = any(p.requires_grad for p in self.twin.parameters()) and self.enabled == self.lora
        if self.unsure or self.merged or not trained or any(self.output(size) is None for size in sizes):
            return
        expected = self._gradients(self.twin, sizes)
        found: list[dict[str, Tensor]] = []
        self.attempt("a backward", lambda: found.append(self._gradients(self.model, sizes)))
        if found[0].keys() != expected.keys():
            raise Fault("other parameters have gradients", f"{sorted(found[0].keys() ^ expected.keys())[:3]}")
        for key, value in expected.items():
            if not (found[0][key] - value).abs().max() <= 1e-8:
                raise Fault("a gradient is wrong", f"{key} by {(found[0][key] - value).abs().max().item():.2g}")
        self.check()

    def _gradients(self, model: nn.Module, sizes: tuple[int, ...]) -> dict[str, Tensor]:
        model.zero_grad()
        outputs = []
        for size in sizes:
            if model is self.twin:
                self.expected.spec, self.expected.size = self.spec, SIZES[self.family][size]
                with self.expected:
                    outputs.append(model(**self.inputs(size), return_dict=False)[0])
            else:
                outputs.append(model(**self.inputs(size), return_dict=False)[0])
        sum(out.square().mean() for out in outputs).backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and ".dit_accel." not in key}
        model.zero_grad()
        return found

    def forward_that_raises(self, where: str = "input") -> None:
        """A forward that ends in an exception: by an input that does not fit, or in the last layer."""
        if self.output(1) is None:  # a layout by hand that does not fit raises another error
            return
        inputs = self.inputs(1)
        error: type[Exception] = RuntimeError
        handle = None
        if where == "input":
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][..., :-3]
        else:
            error = Left
            handle = self.model.get_submodule(self.layers[-1]).register_forward_pre_hook(_raise_left)
        try:
            with torch.no_grad():
                self.model(**inputs, return_dict=False)
        except (error, RuntimeError):
            pass
        else:
            raise Fault("a forward with a bad input returned")
        finally:
            if handle is not None:
                handle.remove()
        self.check()

    def threads(self, sizes: tuple[int, int] = (0, 1)) -> None:
        """Forwards of two sizes in two threads at the same time: both are at the first layer before one enters it."""
        expected = [self.output(size) for size in sizes]
        if self.unsure or any(out is None for out in expected):
            return
        barrier, results = threading.Barrier(2, timeout=0.5), {}
        meet = functools.partial(_meet, barrier)
        first = next((name for name, _ in self.model.named_modules() if name in self.layers), "")
        handle = self.model.get_submodule(first).register_forward_pre_hook(meet)

        def work(number: int) -> None:
            try:
                with torch.no_grad():
                    results[number] = self.model(**self.inputs(sizes[number]), return_dict=False)[0]
            except Exception as error:
                results[number] = error

        workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        handle.remove()
        for number, wanted in enumerate(expected):
            out: Any = results[number]
            if isinstance(out, Exception):
                raise Fault("a forward in a thread was refused", f"{type(out).__name__}: {out}") from out
            self._compare("a forward in a thread", out, wanted)
        self.check()


def _raise_left(*_: Any) -> None:
    raise Left("in the middle of a forward")


def _meet(barrier: threading.Barrier, *_: Any) -> None:
    try:
        barrier.wait()
    except threading.BrokenBarrierError:  # one forward after the other is right as well
        return
