"""FSDP through torch's ``fully_shard``, as accelerate is configured: parameters, gradients and optimizer state sharded.

A model stays the same module with the same parameter names; its parameters are DTensors, gathered only while their
block computes. Files hold full tensors, so a run can resume with or without FSDP.
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

from dit_accel.weights.save import whole

__all__ = [
    "average", "check_launch", "check_split", "choose_blocks", "env_flag", "full_optimizer_state", "gather",
    "is_sharded", "reshard", "set_up", "shard", "shard_like", "shard_optimizer_state", "wrap_forward",
]  # fmt: skip

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
    if not is_sharded(accelerator) or accelerator.state.fsdp_plugin.auto_wrap_policy is None:
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


def shard(accelerator: Accelerator, model: nn.Module, alone: Iterable[str] = ()) -> None:
    """Shard a model's parameters among the processes, in place; blocks are moved to the device one at a time.

    Args: alone: names of modules that are also called directly, outside their block's forward pass.
    """
    plugin = accelerator.state.fsdp_plugin
    for name in alone:
        fully_shard(
            model.get_submodule(name), reshard_after_forward=plugin.reshard_after_forward,
            mp_policy=plugin.mixed_precision_policy,
        )  # fmt: skip
    accelerate.utils.fsdp2_prepare_model(accelerator, model)


def wrap_forward(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``call``, which uses modules of a sharded model, with the FSDP hooks of the model's own forward."""
    setattr(model, _METHOD, call)
    register_fsdp_forward_method(model, _METHOD)
    wrapped: Callable[..., Any] = model.__dict__.pop(_METHOD)
    return wrapped


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters; those of the root module stay gathered after a forward pass without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over the processes for parameters that are not sharded, such as :mod:`.selection`'s scores."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            parameter.grad.copy_(accelerator.reduce(parameter.grad, "mean"))


def gather(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather full tensors, one at a time; a collective call, so every process must make it.

    Args: keep: whether this process needs the result.
    Returns: full tensors on the CPU by name; empty without ``keep``.
    """
    found = {}
    for name, value in values.items():
        full = whole(value.detach())
        if keep:
            found[name] = full.cpu()
    return found


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a full tensor, sharded like ``like``; the tensor itself if ``like`` is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


def full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with full tensors, gathered as in :func:`gather`."""
    state = optimizer.state_dict()
    found = {}
    for i, values in state["state"].items():
        full = {key: whole(value) for key, value in values.items()}
        if keep:
            found[i] = {key: x.cpu() if isinstance(values[key], DTensor) else x for key, x in full.items()}
    return {**state, "state": found}


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard a result of :func:`full_optimizer_state` for ``optimizer.load_state_dict`` in this process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            i: {k: shard_like(x, parameters[i]) if x.shape == parameters[i].shape else x for k, x in values.items()}
            for i, values in state["state"].items()
        },
    }
