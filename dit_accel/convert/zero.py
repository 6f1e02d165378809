"""DeepSpeed's ZeRO, stages 1 and 2: each process holds a part of the optimizer's state, of stage 2 also of the
gradients; parameters stay whole in all. [arXiv 1910.02054, as accelerate's configuration has it]

DeepSpeed takes the step itself, in the backward pass of a step's last batch, and clips there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from .sharding import asked, check_split

__all__ = ["all_parts", "autocast", "check_zero", "is_zero", "restore_part", "set_up_zero"]

_ASKED = "ACCELERATE_USE_DEEPSPEED"
_INSTEAD = "choose FSDP of version 2 with accelerate config, which splits parameters as well"


def check_zero(mixed_precision: str, selects: bool) -> None:
    """What can be told before DeepSpeed starts.

    Raises: ValueError: it is not installed, or something that does not go together with it.
    """
    if not asked(_ASKED):
        return
    if find_spec("deepspeed") is None:
        raise ValueError("accelerate is configured to DeepSpeed, which is not installed: pip install deepspeed")
    check_split("DeepSpeed", mixed_precision)
    if selects:
        raise ValueError(f"--recipe linvideo chooses layers while it trains, which DeepSpeed does not know: {_INSTEAD}")


def set_up_zero(accelerator: Accelerator, batch: int, precision: str) -> None:
    """Complete DeepSpeed's configuration; does nothing without it. precision: "no" or "bf16", which is autocast of
    float32 parameters as everywhere else, not parameters in bfloat16.

    Raises: ValueError: a stage or section of the configuration that a conversion does not run with.
    """
    if not is_zero(accelerator):
        if asked(_ASKED):  # accelerate leaves it out without a word
            raise ValueError(
                "DeepSpeed does not go with --device cpu, nor without accelerate launch: leave one of them out"
            )
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        raise ValueError(
            f"convert runs with ZeRO of stage 1 or 2, and zero_stage is {zero.get('stage', 0)}: {_INSTEAD}"
        )
    for what in ("offload_optimizer", "offload_param"):
        if zero.get(what, {}).get("device", "none") != "none":
            raise ValueError(f"convert does not run with ZeRO's {what}: set its device to none, or {_INSTEAD}")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(f"take the section {section} out of DeepSpeed's configuration: convert has its own")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("take the section fp16 out of DeepSpeed's configuration: use --mixed-precision bf16 or no")
    config.update(
        train_micro_batch_size_per_gpu=batch,
        train_batch_size=batch * accelerator.num_processes,
        gradient_accumulation_steps=1,  # the trainer divides and says which batch is the last
        gradient_clipping=1.0,
        bf16={"enabled": False},
        torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16"},
    )


def is_zero(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def autocast(accelerator: Accelerator, precision: str) -> AbstractContextManager[Any]:
    """As ``accelerator.autocast()``, which does nothing under DeepSpeed."""
    if is_zero(accelerator) and precision == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


def all_parts(optimizer: Any, keep: bool) -> dict[str, Any]:
    """The state of AdamW in each process, on the CPU, where it is to be kept. Every process has to call it."""
    ours = _base(optimizer).state_dict()
    state = {i: {key: x.cpu() for key, x in values.items()} for i, values in ours["state"].items()}
    groups = [{key: x for key, x in group.items() if key != "params"} for group in ours["param_groups"]]
    parts: list[Any] | None = [None] * dist.get_world_size() if keep else None
    dist.gather_object({"state": state, "groups": groups}, parts)
    return {"parts": parts}


def restore_part(optimizer: Any, state: dict[str, Any], rank: int) -> None:
    """What :func:`all_parts` gave, into the optimizer; parameters have been put back before."""
    base, part = _base(optimizer), state["parts"][rank]
    groups = base.state_dict()["param_groups"]
    base.load_state_dict({
        "state": part["state"],
        "param_groups": [{**group, **kept} for group, kept in zip(groups, part["groups"], strict=True)],
    })  # fmt: skip
    optimizer.optimizer.refresh_fp32_params()  # the parts that are stepped, from the parameters


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """AdamW in DeepSpeed's optimizer in accelerate's."""
    found: torch.optim.Optimizer = optimizer.optimizer.optimizer
    return found
