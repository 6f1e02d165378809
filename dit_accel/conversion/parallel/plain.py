"""One process, or several with a whole model each (torch's ``DistributedDataParallel``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from ..recipes.objective import copy_teacher
from .protocol import check_origin

__all__ = ["Plain"]


class Plain:
    """Implementation of :class:`.protocol.Parallel` by accelerate alone; the others override what differs."""

    collective = False

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.stops_together = accelerator.num_processes > 1
        self.captures_graphs = accelerator.num_processes == 1

    def check_model(self, model: nn.Module) -> None:
        pass

    def place(self, host: nn.Module) -> None:
        pass

    def new_teacher(self, host: nn.Module, trained: set[str]) -> nn.Module:
        teacher = copy_teacher(host, trained)
        if self.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
            return teacher
        compiled: nn.Module = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        return compiled

    def shard(self, host: nn.Module, alone: Iterable[str]) -> None:
        pass

    def prepare(self, host: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        model, prepared = self.accelerator.prepare(called, optimizer)
        return model, prepared

    def finish_stage(self, model: Any) -> None:
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def free_gathered(self, host: nn.Module) -> None:
        pass

    def drawing(self, host: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def micro_batch(self, host: nn.Module, model: Any, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(model)

    def clip_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self.accelerator.clip_grad_norm_(parameters, 1.0)

    def gather(self, values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in values.items()} if keep else {}

    def local(self, value: Tensor, like: Tensor) -> Tensor:
        return value

    def optimizer_state(self, optimizer: Any, keep: bool) -> dict[str, Any]:
        state: dict[str, Any] = optimizer.state_dict()
        return state if keep else {**state, "state": {}}

    def check_optimizer_state(self, state: Mapping[str, Any], out: Path) -> None:
        check_origin(state, out, deepspeed=False)

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        optimizer.load_state_dict(state)
