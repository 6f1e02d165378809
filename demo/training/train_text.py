"""Pretrain the text encoders before the denoiser.

A linear head, discarded afterwards, predicts all attributes of a named object from the embedding of its noun. The
denoiser then starts from embeddings in which colours are already bound to shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from dit_accel.demo.training.batches import NAMED, NUM_CLASSES, Batch, SceneStream, half_precision
from dit_accel.demo.training.build import Config

LONG_TEXT = 512


def t5_embeddings(pipe: DiffusionPipeline, ids: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length, text_dim) embeddings, padded and masked exactly as by the pipeline's `encode_prompt`."""
    ids = F.pad(ids, (0, length - ids.shape[1]), value=0)
    if isinstance(pipe, FluxPipeline):
        return pipe.text_encoder_2(ids)[0]
    mask = (ids != 0).long()
    return pipe.text_encoder(ids, mask).last_hidden_state * mask[..., None]


def text_encoders(pipe: DiffusionPipeline) -> list[Any]:
    return [pipe.text_encoder, pipe.text_encoder_2] if isinstance(pipe, FluxPipeline) else [pipe.text_encoder]


def train_text(
    pipe: DiffusionPipeline, config: Config, stream: SceneStream, deadline: float, log: Callable[..., None]
) -> float:
    """Train until `deadline` (time.monotonic) or until all attributes are right; return the running accuracy."""
    device = stream.device
    total = sum(NUM_CLASSES)
    token_head = nn.Linear(config.text_dim, total).to(device)
    pooled_head = nn.Linear(config.text_dim, NAMED * total).to(device)
    modules = [*text_encoders(pipe), token_head, pooled_head]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    start, right, step = time.monotonic(), 0.0, 0
    while time.monotonic() < deadline and right < 0.9999:
        long_text = step % config.long_text_every == config.long_text_every - 1
        batch = stream.next(16 if device.type == "cpu" else 128 if long_text else 512)
        passed = (time.monotonic() - start) / max(1e-3, deadline - start)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * max(0.05, 1 - passed)
        with half_precision(device):
            length = LONG_TEXT if long_text else batch.t5_ids.shape[1]
            tokens = t5_embeddings(pipe, batch.t5_ids, length)
            rows = torch.arange(len(tokens), device=device)[:, None]
            logits = [token_head(tokens[rows, batch.nouns])]
            if isinstance(pipe, FluxPipeline):
                pooled = pipe.text_encoder(batch.clip_ids).pooler_output
                logits.append(pooled_head(pooled).unflatten(-1, (NAMED, total)))
        loss, accuracy = _classification_loss(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = 0.98 * right + 0.02 * accuracy if step else accuracy
        step += 1
        log(f"text step {step} loss {loss.item():.4f} attributes right {right:.4f}")
    return right


def _classification_loss(logits: list[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, float]:
    loss, hits, count = (torch.zeros((), device=batch.labels.device) for _ in range(3))
    for each in logits:
        for part, target in zip(each.float().split(NUM_CLASSES, -1), batch.labels.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=-100)
            hits = hits + (part.argmax(-1) == target).sum()
            count = count + (target >= 0).sum()
    return loss, float(hits / count)
