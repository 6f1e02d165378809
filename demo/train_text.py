"""Teaches the text encoders to read captions before the denoiser sees them.

Each named object's token must tell everything that the caption says of the object, by a linear head that is thrown
away afterwards. The denoiser then starts from embeddings in which colours already belong to shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from dit_accel.demo.batches import ANSWERS, NAMED, Batch, SceneStream, half_precision
from dit_accel.demo.build import Config

LONG_TEXT = 512


def t5_embeddings(pipe: DiffusionPipeline, ids: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length, text_dim), padded and masked exactly as the pipeline's own `encode_prompt` does."""
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
    """Trains until `deadline` (time.monotonic) or until every answer is right; returns the share of right answers."""
    device = stream.device
    total = sum(ANSWERS)
    token_head = nn.Linear(config.text_dim, total).to(device)
    pooled_head = nn.Linear(config.text_dim, NAMED * total).to(device)
    modules = [*text_encoders(pipe), token_head, pooled_head]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    begun, right, step = time.monotonic(), 0.0, 0
    while time.monotonic() < deadline and right < 0.9999:
        long_text = step % config.long_text_every == config.long_text_every - 1
        batch = stream.next(16 if device.type == "cpu" else 128 if long_text else 512)
        passed = (time.monotonic() - begun) / max(1e-3, deadline - begun)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * max(0.05, 1 - passed)
        with half_precision(device):
            length = LONG_TEXT if long_text else batch.t5_ids.shape[1]
            tokens = t5_embeddings(pipe, batch.t5_ids, length)
            rows = torch.arange(len(tokens), device=device)[:, None]
            logits = [token_head(tokens[rows, batch.nouns])]
            if isinstance(pipe, FluxPipeline):
                pooled = pipe.text_encoder(batch.clip_ids).pooler_output
                logits.append(pooled_head(pooled).unflatten(-1, (NAMED, total)))
        loss, accuracy = _answer_loss(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = 0.98 * right + 0.02 * accuracy if step else accuracy
        step += 1
        log(f"text step {step} loss {loss.item():.4f} answers right {right:.4f}")
    return right


def _answer_loss(logits: list[torch.Tensor], batch: Batch) -> tuple[torch.Tensor, float]:
    loss, hits, count = (torch.zeros((), device=batch.answers.device) for _ in range(3))
    for each in logits:
        for part, target in zip(each.float().split(ANSWERS, -1), batch.answers.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=-100)
            hits = hits + (part.argmax(-1) == target).sum()
            count = count + (target >= 0).sum()
    return loss, float(hits / count)
