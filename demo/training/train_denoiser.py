"""Train the denoisers of the embedded pipelines, with their text encoders, by flow matching in a wall-clock budget.

Most steps use small pictures; positions are stretched, so that a place has the same rotary angles at each size. The
models are small, so rendering and encoding clips and kernel launches limit the speed. Therefore latents are reused with
new noise, and on a GPU each step is one CUDA graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from dit_accel.demo.scenes.render import draw_object, render
from dit_accel.demo.scenes.vocabulary import share_capitals
from dit_accel.demo.training.batches import Batch, SceneStream, half_precision
from dit_accel.demo.training.build import Config, Phase, VideoConfig
from dit_accel.demo.training.train_text import LONG_TEXT, t5_embeddings, text_encoders
from dit_accel.demo.training.train_vae import clip_times, encode

EAGER_STEPS = 20  # before the first capture: creates the optimizer's state and compiles the kernels


class StretchedRope(nn.Module):
    """Wan's rotary table for a grid with fewer tokens per side, stretched to the angles of the full grid."""

    def __init__(self, model: WanTransformer3DModel, frames: int, side: int, full_side: int) -> None:
        super().__init__()
        rope = model.rope
        stretched = (torch.arange(side) + 0.5) * (full_side / side) - 0.5
        axes = (torch.arange(frames).double(), stretched.double(), stretched.double())
        cos: list[torch.Tensor] = []
        sin: list[torch.Tensor] = []
        for axis, (positions, dim) in enumerate(zip(axes, (rope.t_dim, rope.h_dim, rope.w_dim), strict=True)):
            pair = get_1d_rotary_pos_embed(
                dim, positions, 10000.0, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            shape = [1, 1, 1, dim]
            shape[axis] = -1
            for tables, table in zip((cos, sin), pair, strict=True):
                tables.append(table.view(shape).expand(frames, side, side, dim))
        self.register_buffer("cos", torch.cat(cos, -1).reshape(1, -1, 1, sum(t.shape[-1] for t in cos)).float())
        self.register_buffer("sin", torch.cat(sin, -1).reshape(1, -1, 1, sum(t.shape[-1] for t in sin)).float())

    cos: torch.Tensor
    sin: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos, self.sin


def stretched_ids(side: int, full_side: int, device: torch.device) -> torch.Tensor:
    """Flux's image position ids for a grid with fewer tokens per side, stretched to the full grid."""
    axis = (torch.arange(side, device=device) + 0.5) * (full_side / side) - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)


def sample_sigmas(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """Sample noise levels: half logit-normal, half uniform, then shifted like the scheduler's sigmas."""
    middle = torch.sigmoid(torch.randn(count, device=device))
    level = torch.where(torch.rand(count, device=device) < 0.5, middle, torch.rand(count, device=device))
    return shift * level / (1 + (shift - 1) * level)


class LatentPool:
    """Ring buffer of the latest `capacity` latents with their captions; `sample` returns a random batch."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count, self.place = capacity, 0, 0
        self.rows: list[torch.Tensor] = []

    def add(self, latents: torch.Tensor, batch: Batch) -> None:
        rows = [latents, *(getattr(batch, f.name) for f in fields(Batch))]
        if not self.rows:
            self.rows = [x.new_empty(self.capacity, *x.shape[1:]) for x in rows]
        index = (torch.arange(len(latents), device=latents.device) + self.place) % self.capacity
        for kept, new in zip(self.rows, rows, strict=True):
            kept[index] = new
        self.place = (self.place + len(latents)) % self.capacity
        self.count = min(self.capacity, self.count + len(latents))

    def sample(self, count: int) -> tuple[torch.Tensor, Batch]:
        index = torch.randint(self.count, (count,), device=self.rows[0].device)
        latents, *rest = (kept[index] for kept in self.rows)
        return latents, Batch(*rest)


class DenoiserTrainer:
    """Trainer of the denoiser and text encoders: one `step` per batch, averaged weights at the end."""

    def __init__(self, pipe: DiffusionPipeline, config: Config, stream: SceneStream) -> None:
        self.pipe, self.config, self.stream = pipe, config, stream
        self.model, self.device = pipe.transformer, stream.device
        self.draw: Callable[..., torch.Tensor] | None = None
        if self.device.type == "cuda":
            self.draw = torch.compile(draw_object, dynamic=False)
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.original_rope = getattr(self.model, "rope", None)
        text = [p for encoder in text_encoders(pipe) for p in encoder.parameters()]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "peak": config.lr, "weight_decay": config.weight_decay},
            {"params": others, "peak": config.lr, "weight_decay": 0.0},
            {"params": text, "peak": config.text_lr, "weight_decay": 0.0},
        ]
        cuda = self.device.type == "cuda"
        rate = torch.tensor(
            0.0, device=self.device
        )  # a tensor, so that a captured step reads its current value at replay
        for group in groups:
            group["lr"] = rate.clone()
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=cuda, capturable=cuda)
        self.graphs: dict[tuple[Any, ...], _CapturedStep] = {}
        self.parameters = [*decayed, *others, *text]
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.steps = 0

    def enter_phase(self, phase: Phase) -> None:
        """Set the positions for the size of this phase."""
        full, side = self.config.token_side, self.config.token_side * phase.size // self.config.size
        if isinstance(self.config, VideoConfig):
            frames = (self.config.frames - 1) // 2 + 1
            whole = side == full
            self.model.rope = (
                self.original_rope if whole else StretchedRope(self.model, frames, side, full).to(self.device)
            )
        self.image_ids = stretched_ids(side, full, self.device)
        self.graphs.clear()

    def save(self, write: Callable[[DiffusionPipeline], object]) -> None:
        """Write the pipeline with the averaged weights, then restore the weights under training."""
        rope, kept = getattr(self.model, "rope", None), [p.detach().clone() for p in self.parameters]
        embedding = text_encoders(self.pipe)[-1].get_input_embeddings().weight
        row = embedding.detach().clone()
        self.load_averaged()
        write(self.pipe)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
            embedding.copy_(row)
        if rope is not None:
            self.model.rope = rope

    def load_averaged(self) -> None:
        """Load the averaged weights and restore the pipeline's own rotary embedding."""
        if self.original_rope is not None:
            self.model.rope = self.original_rope
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.averaged, strict=True):
                parameter.copy_(value)
        t5 = text_encoders(self.pipe)[-1]
        share_capitals(t5.get_input_embeddings().weight)

    @torch.no_grad()
    def latents(self, batch: Batch, size: int) -> torch.Tensor:
        moments = clip_times(self.config, self.device)
        pixels = render(batch.rows, batch.backgrounds, size, moments, self.draw)
        vae = self.pipe.vae
        with half_precision(self.device):
            mean = encode(vae, pixels).mean.float()
        if not isinstance(self.config, VideoConfig):
            return FluxPipeline._pack_latents(mean, *mean.shape)
        shape = (1, -1, 1, 1, 1)
        center = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        return (mean - center) / torch.tensor(vae.config.latents_std, device=self.device).view(shape)

    def loss(self, latents: torch.Tensor, batch: Batch, shift: float, long_text: bool) -> torch.Tensor:
        count = len(latents)
        sigma = sample_sigmas(count, shift, self.device)
        noise = torch.randn_like(latents)
        level = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = torch.lerp(latents, noise, level)
        ids = batch.t5_ids
        if self.config.caption_dropout:
            empty = torch.zeros_like(ids)
            empty[:, 0] = 1
            ids = torch.where(torch.rand(count, 1, device=self.device) < self.config.caption_dropout, empty, ids)
        eager = long_text and self.device.type == "cuda"
        with half_precision(self.device):
            text = t5_embeddings(self.pipe, ids, LONG_TEXT if long_text else ids.shape[1])
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                velocity = self._velocity(noisy, sigma, text, batch)
        return F.mse_loss(velocity.float(), noise - latents)

    def _velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, batch: Batch) -> torch.Tensor:
        if isinstance(self.config, VideoConfig):
            return self.model(noisy, sigma * 1000, text, return_dict=False)[0]
        pooled = self.pipe.text_encoder(batch.clip_ids).pooler_output
        text_ids = torch.zeros(text.shape[1], 3, device=self.device)
        return self.model(noisy, text, pooled, sigma, self.image_ids, text_ids, return_dict=False)[0]

    def step(self, latents: torch.Tensor, batch: Batch, shift: float, progress: float) -> torch.Tensor:
        """Run one optimizer step; `progress` in 0…1 of the whole budget sets the learning rate."""
        ramp = min(1.0, (self.steps + 1) / 200)
        decay = 1.0 if progress < 0.3 else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.3) / 0.7))
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak"] * ramp * decay)
        long_text = progress > 0.5 and self.steps % self.config.long_text_every == 0
        if self.device.type == "cuda" and self.steps >= EAGER_STEPS:
            key = (latents.shape, shift, long_text)
            if key not in self.graphs:
                self.graphs[key] = _CapturedStep(self, latents, batch, shift, long_text)
            loss = self.graphs[key](latents, batch)
        else:
            loss = self.update(latents, batch, shift, long_text)
        self.steps += 1
        keep = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.parameters], 1 - keep)
        return loss

    def update(self, latents: torch.Tensor, batch: Batch, shift: float, long_text: bool) -> torch.Tensor:
        """Compute loss and gradients and update the parameters: the part captured as a CUDA graph."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(latents, batch, shift, long_text)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        return loss.detach()


class _CapturedStep:
    """`DenoiserTrainer.update` for batches of one shape, as a CUDA graph."""

    def __init__(self, trainer: DenoiserTrainer, latents: torch.Tensor, batch: Batch, shift: float, long: bool) -> None:
        self.inputs = [latents.clone(), *(getattr(batch, f.name).clone() for f in fields(Batch))]
        static_latents, static_batch = self.inputs[0], Batch(*self.inputs[1:])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: allocations and compilation of the first calls must not be captured
            for _ in range(3):
                trainer.update(static_latents, static_batch, shift, long)
        torch.cuda.current_stream().wait_stream(side)
        trainer.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = trainer.update(static_latents, static_batch, shift, long)

    def __call__(self, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
        given = [latents, *(getattr(batch, f.name) for f in fields(Batch))]
        torch._foreach_copy_(self.inputs, given)
        self.graph.replay()
        return self.loss.clone()


def train_denoiser(
    pipe: DiffusionPipeline,
    config: Config,
    stream: SceneStream,
    phases: tuple[Phase, ...],
    deadline: float,
    log: Callable[..., None],
    write: Callable[[DiffusionPipeline], object],
) -> int:
    """Train through the phases until `deadline`, load the averaged weights, and return the number of steps.

    `write` saves the pipeline; it is called after each phase.
    """
    pipe.vae.requires_grad_(False)
    trainer = DenoiserTrainer(pipe, config, stream)
    start = time.monotonic()
    budget, passed, average = max(1e-3, deadline - start), 0.0, None
    for phase in phases:
        passed += phase.share / sum(p.share for p in phases)
        trainer.enter_phase(phase)
        pool = LatentPool(config.pool_batches * phase.batch)
        seen, since, first = 0, time.monotonic(), True
        while first or time.monotonic() < start + passed * budget:
            for _ in range(config.first_batches if first else 1):
                batch = stream.next(phase.batch)
                pool.add(trainer.latents(batch, phase.size), batch)
            for _ in range(config.reuse):
                progress = min(1.0, (time.monotonic() - start) / budget)
                loss = trainer.step(*pool.sample(phase.batch), phase.shift, progress)
                average = loss if average is None else torch.lerp(average, loss, 0.02)
            if first and pipe.device.type == "cuda":
                log(f"{phase.size} px: first step after {time.monotonic() - since:.0f} s", True)
                seen, since = 0, time.monotonic()
            first, seen = False, seen + phase.batch * config.reuse
            rate = seen / max(1e-3, time.monotonic() - since)
            log(lambda s=trainer.steps, p=phase.size, a=average, r=rate: f"denoiser {s} {p} px loss {a:.4f} {r:.0f}/s")
        trainer.save(write)
    trainer.load_averaged()
    return trainer.steps
