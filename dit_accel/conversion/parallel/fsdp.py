"""FSDP through torch's ``fully_shard``, as accelerate is configured: parameters, gradients and optimizer state sharded.

A model stays the same module with the same parameter names; its parameters are DTensors, gathered only while their
block computes. Files hold full tensors, so a run can resume with or without FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dit_accel.weights.save import whole

from ..recipes.objective import copy_teacher
from .plain import Plain

__all__ = ["Fsdp", "check_launch", "check_split", "choose_blocks", "env_flag", "is_sharded", "set_up"]

_PRECISIONS = {"bf16": torch.bfloat16}
_METHOD = "_dit_accel_call"


def env_flag(name: str) -> bool:
    """Whether accelerate has set this environment variable to a true value."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_split(what: str, mixed_precision: str) -> None:
    """Check options that ``convert`` supports neither with FSDP nor with DeepSpeed.

    Args: what: "FSDP" or "DeepSpeed".
    Raises: ValueError: compilation or fp16.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise ValueError(
            f"convert does not support compilation with {what}: set dynamo_backend: no in accelerate's configuration"
        )
    if mixed_precision == "fp16":
        raise ValueError(f"convert does not support --mixed-precision fp16 with {what}: use bf16 or no")


def check_launch(mixed_precision: str) -> None:
    """Check accelerate's configuration, which its processes get as environment variables.

    Raises: ValueError: a setting that ``convert`` does not support.
    """
    instead = "choose FSDP of version 2 (fsdp_version: 2) or plain multi-GPU with accelerate config"
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if env_flag(variable):
            raise ValueError(f"accelerate is configured for {what}, which convert does not support: {instead}")
    if not env_flag("ACCELERATE_USE_FSDP"):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"accelerate is configured for FSDP of version {version}, convert supports version 2: set "
            "fsdp_version: 2 in its configuration, or give accelerate launch --fsdp_version 2"
        )
    if not hasattr(accelerate.utils, "fsdp2_prepare_model"):
        raise ValueError(f"accelerate {accelerate.__version__} has no FSDP of version 2: pip install -U accelerate")
    if env_flag("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("convert does not support CPU offload of parameters with FSDP: set fsdp_offload_params: false")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "FSDP's SIZE_BASED_WRAP would shard module lists, which torch does not support: set "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, which shards the denoiser's blocks"
        )
    if env_flag("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "convert does not support FSDP's activation checkpointing, which renames modules: set "
            "fsdp_activation_checkpointing: false, and give --gradient-checkpointing"
        )
    check_split("FSDP", mixed_precision)


def set_up(accelerator: Accelerator) -> None:
    """Complete accelerate's FSDP settings, after :func:`check_launch`; does nothing without FSDP.

    Raises: ValueError: FSDP on the CPU of a machine with GPUs, which torch would shard to.
    """
    if not env_flag("ACCELERATE_USE_FSDP"):
        return
    state: Any = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # accelerate silently ignores FSDP here
        if torch.accelerator.is_available():
            raise ValueError("FSDP with --device cpu needs a machine without GPUs: leave out --device or FSDP")
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return
    plugin = state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # for transformers' models; every process has loaded the diffusers model
    # Inputs are not cast, since timesteps up to 1000 must not be rounded to bfloat16; autocast casts the rest.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=_PRECISIONS.get(accelerator.mixed_precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def is_sharded(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def choose_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """Set the block classes that FSDP shards: those of the configuration, else diffusers' ``_no_split_modules``.

    Raises: ValueError: the model has no such blocks.
    """
    if accelerator.state.fsdp_plugin.auto_wrap_policy is None:
        return
    plugin = accelerator.state.fsdp_plugin
    there = {type(module).__name__ for module in model.modules()}
    blocks = [name for name in getattr(model, "_no_split_modules", None) or [] if name in there]
    wanted = plugin.transformer_cls_names_to_wrap or blocks
    if (missing := [name for name in wanted if name not in there]) or not wanted:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing) or 'nothing'}; the blocks of "
            f"{type(model).__name__} are {', '.join(blocks) or 'of unknown classes'}: name these, or set "
            "fsdp_auto_wrap_policy: NO_WRAP"
        )
    plugin.transformer_cls_names_to_wrap = wanted


class Fsdp(Plain):
    """FSDP2: parameters, gradients and optimizer state of student and teacher are sharded."""

    collective = True

    def check_model(self, model: nn.Module) -> None:
        choose_blocks(self.accelerator, model)

    def place(self, host: nn.Module) -> None:
        host.to("cpu")  # blocks of student and teacher return to the device one at a time, as shards

    def new_teacher(self, host: nn.Module, trained: set[str]) -> nn.Module:
        """Sharded copy of all parameters, since two models cannot share sharded parameters."""
        teacher = copy_teacher(host, {name for name, _ in host.named_parameters()})
        self.shard(teacher, ())
        getattr(teacher, "set_reshard_after_forward")(True)  # noqa: B009 (a method of FSDPModule): no backward pass
        return teacher

    def shard(self, host: nn.Module, alone: Iterable[str]) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        for name in alone:
            fully_shard(
                host.get_submodule(name), reshard_after_forward=plugin.reshard_after_forward,
                mp_policy=plugin.mixed_precision_policy,
            )  # fmt: skip
        accelerate.utils.fsdp2_prepare_model(self.accelerator, host)

    def prepare(self, host: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        model = called if called is host else _wrap_forward(host, called.forward)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def finish_stage(self, model: Any) -> None:
        pass

    def free_gathered(self, host: nn.Module) -> None:
        for module in host.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def drawing(self, host: nn.Module) -> Iterator[None]:
        with self.autocast():
            yield
        self.free_gathered(host)

    def micro_batch(self, host: nn.Module, model: Any, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(host)

    def clip_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        for parameter in parameters:  # those that are not sharded, such as the scores of a selection
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))
        super().clip_gradients(parameters)

    def gather(self, values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        found = {}
        for name, value in values.items():  # one at a time
            full = whole(value.detach())
            if keep:
                found[name] = full.cpu()
        return found

    def local(self, value: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()

    def optimizer_state(self, optimizer: Any, keep: bool) -> dict[str, Any]:
        """``optimizer.state_dict()`` with full tensors."""
        state = optimizer.state_dict()
        found = {}
        for i, values in state["state"].items():
            full = {key: whole(value) for key, value in values.items()}
            if keep:
                found[i] = {key: x.cpu() if isinstance(values[key], DTensor) else x for key, x in full.items()}
        return {**state, "state": found}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        likes = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        split = {
            i: {key: self.local(x, likes[i]) if x.shape == likes[i].shape else x for key, x in values.items()}
            for i, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": split})


def _wrap_forward(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``call``, which uses modules of a sharded model, with the FSDP hooks of the model's own forward."""
    setattr(model, _METHOD, call)
    register_fsdp_forward_method(model, _METHOD)
    wrapped: Callable[..., Any] = model.__dict__.pop(_METHOD)
    return wrapped
