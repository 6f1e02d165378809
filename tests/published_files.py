"""Files with the keys and shapes of the published releases, for models of any size; and small models for them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from tiny import TINY

from dit_accel import SLAAttnProcessor
from dit_accel.weights.tensors import Weight, find_weights

WAN_1_3B = {"dim": 1536, "heads": 12, "ffn": 8960, "layers": 30}
WAN_14B = {"dim": 5120, "heads": 40, "ffn": 13824, "layers": 40}


def clear_shapes(double=19, single=38, width=3072, factor=1):
    """Return key -> shape of a CLEAR file; by default for Flux.1-dev."""
    shapes = {}
    for kind, count, names in (
        ("transformer_blocks", double, ("to_q", "to_k", "to_v", "to_out.0")),
        ("single_transformer_blocks", single, ("to_q", "to_k", "to_v")),
    ):
        for i in range(count):
            for name in names:
                shapes[f"{kind}.{i}.attn.{name}.weight"] = (width, width)
                shapes[f"{kind}.{i}.attn.{name}.bias"] = (width,)
            if factor > 1:
                shapes[f"{kind}.{i}.attn.processor.spatial_weight"] = (1, 1, 1, factor, 1, factor, 1)
    return shapes


def wan_shapes(
    dim, heads, ffn, layers, *, channels=16, out=16, text=4096, freq=256, image=None, quantized=False, sla=True
):
    """Return key -> (shape, dtype) of a TurboDiffusion file; ``image``: width of the image embedding (Wan 2.1 I2V)."""
    shapes = {}

    def add(name, *shape, dtype=torch.bfloat16):
        shapes[name] = (shape, dtype)

    def linear(name, n, k, inside=False):
        if quantized and inside:
            add(f"{name}.int8_weight", n, k, dtype=torch.int8)
            add(f"{name}.scale", -(-n // 128), -(-k // 128), dtype=torch.float32)
        else:
            add(f"{name}.weight", n, k)
        add(f"{name}.bias", n)

    linear("patch_embedding", dim, channels * 1 * 2 * 2)
    linear("text_embedding.0", dim, text)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, freq)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    if image:
        add("img_emb.proj.0.weight", image), add("img_emb.proj.0.bias", image)
        linear("img_emb.proj.1", image, image)
        linear("img_emb.proj.3", dim, image)
        add("img_emb.proj.4.weight", dim), add("img_emb.proj.4.bias", dim)
    for i in range(layers):
        block = f"blocks.{i}"
        add(f"{block}.modulation", 1, 6, dim)
        for part in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}.{part}.{name}", dim, dim, inside=True)
            add(f"{block}.{part}.norm_q.weight", dim)
            add(f"{block}.{part}.norm_k.weight", dim)
        if image:
            linear(f"{block}.cross_attn.k_img", dim, dim, inside=True)
            linear(f"{block}.cross_attn.v_img", dim, dim, inside=True)
            add(f"{block}.cross_attn.norm_k_img.weight", dim)
        if sla:
            linear(f"{block}.self_attn.attn_op.local_attn.proj_l", dim // heads, dim // heads)
        add(f"{block}.norm3.weight", dim), add(f"{block}.norm3.bias", dim)
        linear(f"{block}.ffn.0", ffn, dim, inside=True)
        linear(f"{block}.ffn.2", dim, ffn, inside=True)
    add("head.modulation", 1, 2, dim)
    linear("head.head", out * 1 * 2 * 2, dim)
    return shapes


FASTVIDEO = {  # TurboDiffusion's name -> FastVideo's name, in a block and outside
    "self_attn.attn_op.local_attn.proj_l": "attn1.attn_impl.proj_l",
    "self_attn.norm_q": "norm_q", "self_attn.norm_k": "norm_k",
    "self_attn.q": "to_q", "self_attn.k": "to_k", "self_attn.v": "to_v", "self_attn.o": "to_out",
    "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out",
    "norm3": "self_attn_residual_norm.norm", "ffn.0": "ffn.fc_in", "ffn.2": "ffn.fc_out",
    "modulation": "scale_shift_table",
    "text_embedding.0": "condition_embedder.text_embedder.fc_in",
    "text_embedding.2": "condition_embedder.text_embedder.fc_out",
    "time_embedding.0": "condition_embedder.time_embedder.mlp.fc_in",
    "time_embedding.2": "condition_embedder.time_embedder.mlp.fc_out",
    "time_projection.1": "condition_embedder.time_modulation.linear",
    "head.head": "proj_out", "head.modulation": "scale_shift_table", "patch_embedding": "patch_embedding",
}  # fmt: skip


def fastvideo_name(key):
    """Return FastVideo's name of a TurboDiffusion key."""
    start, rest = "", key
    if key.startswith("blocks."):
        _, number, rest = key.split(".", 2)
        start = f"blocks.{number}."
    module, _, end = rest.rpartition(".")
    return start + (FASTVIDEO[rest] if rest in FASTVIDEO else f"{FASTVIDEO[module]}.{end}")


def linfusion_shapes(widths, mid=None):
    """Return key -> shape of a LinFusion file with modules of these widths."""
    shapes = {}
    for i, width in enumerate(widths):
        inner = mid or width
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{i}.{name}.weight"] = (width, width)
        shapes[f"{i}.to_out.0.bias"] = (width,)
        for name in ("to_q_", "to_k_"):
            shapes |= {f"{i}.{name}.0.weight": (inner, width), f"{i}.{name}.0.bias": (inner,)}
            shapes |= {f"{i}.{name}.1.weight": (inner,), f"{i}.{name}.1.bias": (inner,)}
            shapes |= {f"{i}.{name}.3.weight": (width, inner), f"{i}.{name}.3.bias": (width,)}
    return shapes


def modules_list(names, widths, heads, mid=None):
    """Return the contents of LinFusion's config.json."""
    entries = zip(names, widths, heads, strict=True)
    return {"modules_list": [
        {"module_name": name, "dim_n": width, "heads": n, "projection_mid_dim": mid} for name, width, n in entries
    ]}  # fmt: skip


def draw(shapes, seed=0):
    """Return random tensors of these shapes; norm weights have mean 1."""
    torch.manual_seed(seed)
    tensors = {}
    for key, given in shapes.items():
        shape, dtype = given if isinstance(given[-1], torch.dtype) else (given, torch.float32)
        if dtype == torch.int8:
            tensors[key] = torch.randint(-127, 128, shape, dtype=torch.int8)
        elif key.endswith(".scale"):
            tensors[key] = torch.rand(shape) * 0.3 / 127
        else:
            mean = 1.0 if len(shape) == 1 and "norm" in key and key.endswith("weight") else 0.0
            tensors[key] = (torch.randn(shape) * 0.15 + mean).to(dtype)
    return tensors


def listing(shapes):
    """Return weights of these shapes without data; reading one fails."""

    def unread():
        raise AssertionError("a listing has no data")

    return {
        key: Weight(*(given if isinstance(given[-1], torch.dtype) else (given, torch.bfloat16)), unread)
        for key, given in shapes.items()
    }


def write(path, tensors, config=None):
    """Write a safetensors or a torch.save file, depending on the suffix; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return path


TURBO = SLAAttnProcessor(
    critical=0.1, negligible=0.0, block_q=128, block_kv=64, linear_over="all", smooth_key=True, feature_map="softmax"
)


SMALL = {"block_q": 16, "block_kv": 8, "critical": 0.3}  # for 90 tokens


def model_and_inputs(family="flux"):
    torch.manual_seed(11)
    return TINY[family](), TINY[family].inputs(TINY[family].size)


def clear_tensors(factor=1, seed=0):
    return draw(clear_shapes(2, 2, 32, factor), seed)


def wan_size(model):
    config = model.config
    return {
        "dim": config.num_attention_heads * config.attention_head_dim, "heads": config.num_attention_heads,
        "ffn": config.ffn_dim, "layers": config.num_layers, "channels": config.in_channels,
        "out": config.out_channels, "text": config.text_dim, "freq": config.freq_dim, "image": config.image_dim,
    }  # fmt: skip


def find_here():
    return find_weights(__file__)


def in_shards(folder, tensors):
    """Write the tensors as three safetensors shards with an index, as diffusers does; return the folder."""
    folder.mkdir()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: x for key, x in tensors.items() if weight_map[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    return folder


def self_attention(model):
    """Return names, widths and heads of the self-attention modules, listed as the authors of LinFusion do."""
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "to_q") and not m.is_cross_attention]
    names = [name for name, _ in found]
    return names, [m.to_q.weight.shape[0] for _, m in found], [m.heads for _, m in found]


def on_meta(build):
    with torch.device("meta"):
        return build()
