"""FSDP: each process holds a part of every parameter, gradient and optimizer state. [torch's fully_shard, as
accelerate's configuration has it]

A model stays the same module with the same names; its values are DTensors, whole only while the block that
they belong to computes. What is in files is whole, so a run may go on with or without FSDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import accelerate.utils
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..save import whole

__all__ = [
    "asked", "average", "check_launch", "check_split", "choose_blocks", "gather", "is_sharded", "part_like",
    "reshard", "set_up", "shard", "through", "whole_states", "with_parts",
]  # fmt: skip

_PRECISIONS = {"bf16": torch.bfloat16}
_METHOD = "_dit_accel_call"


def asked(name: str) -> bool:
    """Whether accelerate has set this variable of the environment to yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_split(what: str, mixed_precision: str) -> None:
    """Raises: ValueError: compilation or fp16, which neither FSDP nor DeepSpeed are run with."""
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise ValueError(f"convert does not compile under {what}: set dynamo_backend: no in accelerate's configuration")
    if mixed_precision == "fp16":
        raise ValueError(f"--mixed-precision fp16 is not taken under {what}: use bf16 or no")


def check_launch(mixed_precision: str) -> None:
    """What accelerate has been configured to, told by the environment of its processes.

    Raises: ValueError: something that a conversion cannot run with.
    """
    instead = "choose FSDP of version 2 (fsdp_version: 2) or plain multi-GPU with accelerate config"
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if asked(variable):
            raise ValueError(f"accelerate is configured to {what}, which convert does not run with: {instead}")
    if not asked("ACCELERATE_USE_FSDP"):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"accelerate is configured to FSDP of version {version}, and convert runs with version 2: set "
            "fsdp_version: 2 in its configuration, or give accelerate launch --fsdp_version 2"
        )
    if not hasattr(accelerate.utils, "fsdp2_prepare_model"):
        raise ValueError(f"accelerate {accelerate.__version__} has no FSDP of version 2: pip install -U accelerate")
    if asked("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("convert does not keep parameters on the CPU under FSDP: set fsdp_offload_params: false")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "FSDP by size would split lists of modules, which torch does not take: set fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP, which splits a denoiser's blocks"
        )
    if asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "accelerate is configured to FSDP's activation checkpointing, which renames modules: set "
            "fsdp_activation_checkpointing: false, and give --gradient-checkpointing"
        )
    check_split("FSDP", mixed_precision)


def set_up(accelerator: Accelerator) -> None:
    """After :func:`check_launch`; does nothing without FSDP.

    Raises: ValueError: the processes are on the CPU of a machine whose GPUs torch would shard to.
    """
    if not asked("ACCELERATE_USE_FSDP"):
        return
    state: Any = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # here accelerate leaves FSDP out without a word
        if torch.accelerator.is_available():
            raise ValueError("FSDP with --device cpu needs a machine without GPUs: leave --device out, or FSDP")
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return
    plugin = state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # of transformers' models: diffusers' are there in every process
    # Inputs stay as they are, since timesteps of up to 1000 are not to be rounded; autocast sees to the rest.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=_PRECISIONS.get(accelerator.mixed_precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def is_sharded(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def choose_blocks(accelerator: Accelerator, model: nn.Module) -> None:
    """The classes of blocks to be split one by one: those of the configuration, else diffusers' own of the model.

    Raises: ValueError: the model does not have them.
    """
    if not is_sharded(accelerator) or accelerator.state.fsdp_plugin.auto_wrap_policy is None:
        return
    plugin = accelerator.state.fsdp_plugin
    there = {type(module).__name__ for module in model.modules()}
    blocks = [name for name in getattr(model, "_no_split_modules", None) or [] if name in there]
    wanted = plugin.transformer_cls_names_to_wrap or blocks
    if (missing := [name for name in wanted if name not in there]) or not wanted:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(missing) or 'nothing'}; {type(model).__name__} has "
            f"blocks of {', '.join(blocks) or 'other classes'}: name these, or set fsdp_auto_wrap_policy: NO_WRAP"
        )
    plugin.transformer_cls_names_to_wrap = wanted


def shard(accelerator: Accelerator, model: nn.Module, alone: Iterable[str] = ()) -> None:
    """Split a model's parameters among the processes, in place; each block comes to the device only for that.

    Args: alone: names of modules that are called by themselves, without the block around them.
    """
    plugin = accelerator.state.fsdp_plugin
    for name in alone:
        fully_shard(
            model.get_submodule(name), reshard_after_forward=plugin.reshard_after_forward,
            mp_policy=plugin.mixed_precision_policy,
        )  # fmt: skip
    accelerate.utils.fsdp2_prepare_model(accelerator, model)


def through(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which uses parts of a sharded model, as if it were the model's own forward."""
    setattr(model, _METHOD, call)
    register_fsdp_forward_method(model, _METHOD)
    wrapped: Callable[..., Any] = model.__dict__.pop(_METHOD)
    return wrapped


def reshard(model: nn.Module) -> None:
    """Parameters are in parts again: those of the outermost module stay whole after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Mean over processes of the gradients of parameters that are not sharded, such as :mod:`.selection`'s scores."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))


def gather(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole values on the CPU, where they are to be kept. Every process has to call it, one value after the other is
    whole on its device."""
    found = {}
    for name, value in values.items():
        full = whole(value.detach())
        if keep:
            found[name] = full.cpu()
    return found


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole value, split as ``like`` is; the value itself where that is not split."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


def whole_states(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with whole values, as :func:`gather` has them."""
    state = optimizer.state_dict()
    found = {}
    for i, values in state["state"].items():
        full = {key: whole(value) for key, value in values.items()}
        if keep:
            found[i] = {key: x.cpu() if isinstance(values[key], DTensor) else x for key, x in full.items()}
    return {**state, "state": found}


def with_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What :func:`whole_states` gave, for ``optimizer.load_state_dict`` in this process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            i: {k: part_like(x, parameters[i]) if x.shape == parameters[i].shape else x for k, x in values.items()}
            for i, values in state["state"].items()
        },
    }
