"""Training of an installed model with DDP and FSDP on the CPU: two processes with one sample each give the same
parameters as one process with both samples."""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from test_families import NARROW
from tiny import TINY
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import finish, fork_both, start


def train(family, name, folder):
    """Train in this process of two; the first one also alone."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for wrapper in ("ddp", "fsdp") if rank else ("alone", "ddp", "fsdp"):
        torch.manual_seed(0)
        model = TINY[family]().train()
        model.set_attn_processor(NARROW[name])
        model.enable_gradient_checkpointing()
        for module in model.modules():
            if hasattr(module, "dit_accel"):  # nonzero as after training, since zero weights block gradients
                for i, parameter in enumerate(module.dit_accel.parameters()):
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        if rank == 0 and wrapper == "alone":
            torch.save(model.state_dict(), f"{folder}/start.pt")
        wrapped = model
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(model)
        elif wrapper == "fsdp":
            for module in model.modules():
                if type(module).__name__ == TINY[family].block:
                    fully_shard(module)
            wrapped = fully_shard(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
        for step in range(2):
            torch.manual_seed(step)
            inputs = TINY[family].inputs(TINY[family].size, batch=2)
            target = torch.randn_like(inputs["hidden_states"])
            own = slice(None) if wrapper == "alone" else slice(rank, rank + 1)
            mine = {k: v[own] if v.shape[0] == 2 and "ids" not in k else v for k, v in inputs.items()}
            loss = F.mse_loss(wrapped(**mine, return_dict=False)[0], target[own])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
        if rank == 0:
            torch.save(state, f"{folder}/{wrapper}.pt")
    distributed.destroy_process_group()


def test_two_processes_train_like_one_with_both_samples(tmp_path):
    finish(start(__file__, "wan", "sla", tmp_path, CUDA_VISIBLE_DEVICES=""))
    begin, one, *two = (torch.load(tmp_path / f"{x}.pt") for x in ("start", "alone", "ddp", "fsdp"))
    assert any("dit_accel" in key for key in one)
    assert all(not torch.equal(x, begin[key]) for key, x in one.items() if x.is_floating_point())
    for state in two:
        for key, x in one.items():
            torch.testing.assert_close(state[key], x, atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    fork_both(partial(train, *sys.argv[1:]))
