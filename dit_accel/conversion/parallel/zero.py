"""DeepSpeed ZeRO stages 1 and 2, as accelerate is configured. [arXiv 1910.02054]

The optimizer state is sharded among the processes, in stage 2 also the gradients; every process has all parameters.
DeepSpeed clips the gradients and takes the optimizer step itself, in the backward pass of a step's last batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .fsdp import check_split, env_flag
from .plain import Plain
from .protocol import check_origin

__all__ = ["Zero", "check_zero", "is_zero", "set_up_zero"]

_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_INSTEAD = "choose FSDP of version 2 with accelerate config, which also shards parameters"


def check_zero(mixed_precision: str, selects: bool) -> None:
    """Check the options before DeepSpeed starts; does nothing without it.

    Args: selects: whether the recipe selects layers.
    Raises: ValueError: DeepSpeed is not installed, or an option is not supported with it.
    """
    if not env_flag(_USE_DEEPSPEED):
        return
    if find_spec("deepspeed") is None:
        raise ValueError("accelerate is configured for DeepSpeed, which is not installed: pip install deepspeed")
    check_split("DeepSpeed", mixed_precision)
    if selects:
        raise ValueError(
            f"--recipe linvideo selects layers during training, which DeepSpeed does not support: {_INSTEAD}"
        )


def set_up_zero(accelerator: Accelerator, batch: int, precision: str) -> None:
    """Complete DeepSpeed's configuration; does nothing without DeepSpeed.

    Args: precision: "no" or "bf16"; "bf16" is autocast of float32 parameters as elsewhere, not bfloat16 parameters.
    Raises: ValueError: a stage or section of the configuration that ``convert`` does not support.
    """
    if not is_zero(accelerator):
        if env_flag(_USE_DEEPSPEED):  # accelerate silently ignores it
            raise ValueError(
                "DeepSpeed needs accelerate launch, without --device cpu: leave --device out, or configure accelerate "
                "without DeepSpeed"
            )
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        raise ValueError(f"convert supports ZeRO of stage 1 or 2, got zero_stage {zero.get('stage', 0)}: {_INSTEAD}")
    for what in ("offload_optimizer", "offload_param"):
        if zero.get(what, {}).get("device", "none") != "none":
            raise ValueError(f"convert does not support ZeRO's {what}: set its device to none, or {_INSTEAD}")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"convert has its own {section}: remove this section from DeepSpeed's configuration")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            "convert does not support fp16 with DeepSpeed: remove this section from its configuration and use "
            "--mixed-precision bf16 or no"
        )
    config.update(
        train_micro_batch_size_per_gpu=batch,
        train_batch_size=batch * accelerator.num_processes,
        gradient_accumulation_steps=1,  # the trainer accumulates and marks the last batch of a step
        gradient_clipping=1.0,
        bf16={"enabled": False},
        torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16"},
    )


def is_zero(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


class Zero(Plain):
    """ZeRO stages 1 and 2. precision: mixed precision of the request."""

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        super().__init__(accelerator)
        self.precision = precision
        self.stops_together = True  # the step is taken before it is counted: no interrupt may fall between the two
        self.captures_graphs = False

    def finish_stage(self, model: Any) -> None:
        model.destroy()  # its hooks on the parameters
        super().finish_stage(model)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast, also where accelerate's does nothing because it leaves it to DeepSpeed."""
        if self.precision == "bf16":
            return torch.autocast(self.accelerator.device.type, torch.bfloat16)
        return super().autocast()

    def micro_batch(self, host: nn.Module, model: Any, last: bool) -> AbstractContextManager[Any]:
        self.accelerator.sync_gradients = last  # DeepSpeed takes the step in the backward pass of the last batch
        return nullcontext()

    def optimizer_state(self, optimizer: Any, keep: bool) -> dict[str, Any]:
        """Each process's shard of AdamW's state, on the CPU."""
        ours = _base(optimizer).state_dict()
        state = {i: {key: x.cpu() for key, x in values.items()} for i, values in ours["state"].items()}
        groups = [{key: x for key, x in group.items() if key != "params"} for group in ours["param_groups"]]
        parts: list[Any] | None = [None] * dist.get_world_size() if keep else None
        dist.gather_object({"state": state, "groups": groups}, parts)
        return {"parts": parts}

    def check_optimizer_state(self, state: Mapping[str, Any], out: Path) -> None:
        check_origin(state, out, deepspeed=True)

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        base, part = _base(optimizer), state["parts"][self.accelerator.process_index]
        groups = base.state_dict()["param_groups"]
        base.load_state_dict({
            "state": part["state"],
            "param_groups": [{**group, **kept} for group, kept in zip(groups, part["groups"], strict=True)],
        })  # fmt: skip
        optimizer.optimizer.refresh_fp32_params()  # copies the parameters to the shards that the optimizer steps


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's optimizer inside accelerate's."""
    found: torch.optim.Optimizer = optimizer.optimizer.optimizer
    return found
