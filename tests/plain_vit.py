"""A plain ViT that reads lineages' own names: what a checkpoint must give, by code that converters do not share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from checkpoints import tensors_of
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]

TIMM = dict(
    cls="cls_token",
    dist="dist_token",
    reg="register_tokens",
    pos="pos_embed",
    patch="patch_embed.proj",
    norm="norm",
    norm1="blocks.{i}.norm1",
    qkv=["blocks.{i}.attn.qkv"],
    proj="blocks.{i}.attn.proj",
    norm2="blocks.{i}.norm2",
    fc1="blocks.{i}.mlp.fc1",
    fc2="blocks.{i}.mlp.fc2",
    head="head",
    head_dist="head_dist",
)
SCALED = TIMM | dict(ls1="blocks.{i}.ls1.gamma", ls2="blocks.{i}.ls2.gamma")
SWIGLU = SCALED | dict(fc1="blocks.{i}.mlp.w12", fc2="blocks.{i}.mlp.w3")
DEIT3 = TIMM | dict(ls1="blocks.{i}.gamma_1", ls2="blocks.{i}.gamma_2")
OPENCLIP = dict(
    cls="visual.class_embedding",
    pos="visual.positional_embedding",
    patch="visual.conv1",
    norm_pre="visual.ln_pre",
    norm="visual.ln_post",
    norm1="visual.transformer.resblocks.{i}.ln_1",
    qkv=["visual.transformer.resblocks.{i}.attn.in_proj_"],
    proj="visual.transformer.resblocks.{i}.attn.out_proj",
    norm2="visual.transformer.resblocks.{i}.ln_2",
    fc1="visual.transformer.resblocks.{i}.mlp.c_fc",
    fc2="visual.transformer.resblocks.{i}.mlp.c_proj",
    projection="visual.proj",
)
HF_VIT = dict(
    cls="embeddings.cls_token",
    dist="embeddings.distillation_token",
    pos="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    norm="layernorm",
    norm1="encoder.layer.{i}.layernorm_before",
    qkv=[f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")],
    proj="encoder.layer.{i}.attention.output.dense",
    norm2="encoder.layer.{i}.layernorm_after",
    fc1="encoder.layer.{i}.intermediate.dense",
    fc2="encoder.layer.{i}.output.dense",
)
HF_DINOV2 = HF_VIT | dict(
    reg="embeddings.register_tokens",
    norm1="encoder.layer.{i}.norm1",
    norm2="encoder.layer.{i}.norm2",
    fc1="encoder.layer.{i}.mlp.fc1",
    fc2="encoder.layer.{i}.mlp.fc2",
    ls1="encoder.layer.{i}.layer_scale1.lambda1",
    ls2="encoder.layer.{i}.layer_scale2.lambda1",
)
HF_CLIP = dict(
    cls="vision_model.embeddings.class_embedding",
    pos="vision_model.embeddings.position_embedding.weight",
    patch="vision_model.embeddings.patch_embedding",
    norm_pre="vision_model.pre_layrnorm",
    norm="vision_model.post_layernorm",
    norm1="vision_model.encoder.layers.{i}.layer_norm1",
    qkv=[f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"],
    proj="vision_model.encoder.layers.{i}.self_attn.out_proj",
    norm2="vision_model.encoder.layers.{i}.layer_norm2",
    fc1="vision_model.encoder.layers.{i}.mlp.fc1",
    fc2="vision_model.encoder.layers.{i}.mlp.fc2",
    head="visual_projection",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A recorded checkpoint: its names, and what no tensor tells."""

    golden: str
    names: dict[str, Any]
    heads: int
    options: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-6
    quick: bool = False
    depth: int = 3


CASES = (
    Case("deit_base", TIMM, 2, dict(num_heads=2)),
    Case("deit_distilled", TIMM, 4, dict(num_heads=4)),
    Case("deit3_ls", DEIT3, 4, dict(num_heads=4)),
    Case("dinov2_vit_mlp_hub", SCALED, 2, dict(num_heads=2)),
    Case("dinov2_reg4", SCALED, 4, dict(num_heads=4)),
    Case("dinov2_swiglu_reg4", SWIGLU, 2, dict(num_heads=2)),
    Case("hf_vit", HF_VIT, 4, eps=1e-12),
    Case("hf_deit", HF_VIT, 2, eps=1e-12),
    Case("hf_dinov2", HF_DINOV2, 2),
    Case("hf_dinov2_reg", HF_DINOV2, 4),
    Case("hf_clip_vision", HF_CLIP, 4, eps=1e-5, quick=True),
    Case("openclip_vision_gelu", OPENCLIP, 2, dict(num_heads=2, act="gelu"), eps=1e-5),
    Case("openclip_full_plain", OPENCLIP, 4, dict(num_heads=4, act="quick_gelu"), 1e-5, quick=True, depth=2),
)
IN_MEMORY = {case.golden: tensors_of(case.golden) for case in CASES}


class Reference:
    """A ViT on a lineage's tensors, which remembers what it read."""

    def __init__(self, case: Case, tensors: Tensors):
        self.case, self.tensors, self.read = case, tensors, set()

    def get(self, name: str) -> Tensor:
        self.read.add(name)
        assert self.tensors[name].is_floating_point()
        return self.tensors[name].float()

    def has(self, role: str, suffix: str = "") -> bool:
        return role in self.case.names and f"{self.case.names[role]}{suffix}" in self.tensors

    def layer(self, role: str, i: int = 0) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; several layers of the lineage make one."""
        found = self.case.names[role]
        names = [name.format(i=i) for name in ([found] if isinstance(found, str) else found)]
        dots = ["" if name.endswith("_") else "." for name in names]
        weight = torch.cat([self.get(f"{name}{dot}weight") for name, dot in zip(names, dots, strict=True)])
        biases = [f"{name}{dot}bias" for name, dot in zip(names, dots, strict=True)]
        if not any(name in self.tensors for name in biases):
            return weight, None
        return weight, torch.cat([self.get(name) for name in biases])

    def norm(self, role: str, x: Tensor, i: int = 0) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.layer(role, i), self.case.eps)

    def attention(self, x: Tensor, i: int) -> Tensor:
        q, k, v = F.linear(x, *self.layer("qkv", i)).unflatten(2, (3, self.case.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), *self.layer("proj", i))

    def mlp(self, x: Tensor, i: int) -> Tensor:
        x = F.linear(x, *self.layer("fc1", i))
        if self.case.names is SWIGLU:
            gate, value = x.chunk(2, dim=2)
            x = F.silu(gate) * value
        else:
            x = x * torch.sigmoid(1.702 * x) if self.case.quick else F.gelu(x)
        return F.linear(x, *self.layer("fc2", i))

    def branch(self, role: str, x: Tensor, i: int) -> Tensor:
        scaled = role in self.case.names
        return x * self.get(self.case.names[role].format(i=i)) if scaled else x

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normed tokens, and the output of the head if there is one."""
        names = self.case.names
        weight, bias = self.layer("patch")
        patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
        dim = patches.shape[2]
        tokens = [self.get(names["cls"]).reshape(1, 1, dim)]
        if self.has("dist"):
            tokens.append(self.get(names["dist"]))
        pos = self.get(names["pos"]).reshape(1, -1, dim)
        x = torch.cat([*tokens, patches], dim=1)
        x = x + F.pad(pos, (0, 0, x.shape[1] - pos.shape[1], 0))  # DeiT-III has none for the class token
        if self.has("reg"):
            registers = self.get(names["reg"])
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        if "norm_pre" in names:
            x = self.norm("norm_pre", x)
        for i in range(self.case.depth):
            x = x + self.branch("ls1", self.attention(self.norm("norm1", x, i), i), i)
            x = x + self.branch("ls2", self.mlp(self.norm("norm2", x, i), i), i)
        x = self.norm("norm", x)
        return x, self.head(x)

    def head(self, x: Tensor) -> Tensor | None:
        if self.has("projection"):
            return x[:, 0] @ self.get(self.case.names["projection"])
        if not self.has("head", ".weight"):
            return None
        output = F.linear(x[:, 0], *self.layer("head"))
        if self.has("dist"):
            output = (output + F.linear(x[:, 1], *self.layer("head_dist"))) / 2
        return output
