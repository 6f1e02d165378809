"""Write the host's own weights, so that they can be put back exactly."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["check_reachable", "record_replaced", "sample", "stop_recording", "warn_of_changes", "write_host_weight"]

logger = logging.getLogger(__name__)

_RECORDS: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Tensor]]] = weakref.WeakKeyDictionary()


def record_replaced(model: nn.Module) -> dict[str, Tensor]:
    """A dict that from now on receives each weight of the model, as it is now, before it is first replaced."""
    record: dict[str, Tensor] = {}
    _RECORDS.setdefault(model, []).append(record)
    return record


def stop_recording(model: nn.Module, record: dict[str, Tensor]) -> None:
    """End what :func:`record_replaced` began."""
    _RECORDS[model] = [other for other in _RECORDS[model] if other is not record]


@torch.no_grad()
def write_host_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite a parameter of the host; open records keep what it was.

    A LoRA that peft has fused into the weight is taken out before and fused in again after, so that the value counts as
    the base weight's and unfusing later gives it. Projections that diffusers has fused are made again.
    """
    check_reachable(model, [name])
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    fused = list(getattr(owner, "merged_adapters", ()))
    if fused:
        owner.unmerge()  # type: ignore[operator]
    for record in _RECORDS.get(model, ()):
        if name not in record:
            record[name] = parameter.detach().to("cpu", copy=True)
    parameter.copy_(value)
    if fused:
        owner.merge(adapter_names=fused)  # type: ignore[operator]
    attn = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    if getattr(attn, "fused_projections", False) is True:
        setattr(attn, "fused_projections", False)  # noqa: B010 (a diffusers module's)
        attn.fuse_projections()  # type: ignore[operator]


def warn_of_changes(model: nn.Module, names: Iterable[str], written: Mapping[str, Tensor]) -> None:
    """Log a warning if weights that are about to be put back were changed after a load wrote them."""
    changed = [name for name in names if name in written and _is_changed(model, name, written[name])]
    if changed:
        logger.warning(
            "%d weights that load_attention had overwritten were changed afterwards, by training or a merged LoRA "
            "(%s …): the values from before the load are put back, and the changes are lost",
            len(changed),
            changed[0],
        )


def check_reachable(model: nn.Module, names: Iterable[str]) -> None:
    """Raises: RuntimeError: weights that are offloaded, so that nothing can be written into them."""
    away = [name for name in names if model.get_parameter(name).is_meta]
    if away:
        raise RuntimeError(
            f"{len(away)} weights are to be put back but are offloaded ({away[0]} …): remove the offloading hooks "
            "first (pipe.remove_all_hooks())"
        )


def sample(weight: Tensor) -> Tensor:
    """At most 64 numbers spread over a weight, on the CPU."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // 64)][:64].to("cpu", copy=True)


def _is_changed(model: nn.Module, name: str, written: Tensor) -> bool:
    """Whether a weight holds other numbers than were written, by its sample; a conversion to 16 bits is no change."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if getattr(owner, "merged_adapters", ()):  # taken out and fused in again by write_host_weight
        return False
    now = sample(model.get_parameter(name)).double()
    dtypes = (written.dtype, torch.float16, torch.bfloat16)
    return not any(torch.equal(now, written.to(dtype).double()) for dtype in dtypes)
