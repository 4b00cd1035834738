"""What the tensors of a checkpoint tell about its network."""

from dataclasses import dataclass
from typing import Self

from vitreg_hub.conversion.planning.assignment import Assignment


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What tensors tell: sizes, and which parts there are.

    Attributes:
        hidden: Outputs of the MLP's first layer.
        swiglu: Whether these outputs are gate and value.
        proj_bias: Whether layers other than queries, keys and values have a bias.
        average: Whether the norm follows the pooling, as in models that average patches.
    """

    embed_dim: int
    depth: int
    patch_size: tuple[int, int]
    in_chans: int
    hidden: int
    swiglu: bool
    layer_scale: bool
    pre_norm: bool
    qkv_bias: bool
    proj_bias: bool
    num_registers: int
    distilled: bool
    position_rows: int
    num_classes: int
    average: bool

    @classmethod
    def of(cls, tensors: Assignment) -> Self:
        """Read the structure from shapes.

        Raises:
            ConversionError: A tensor that decides it is missing or has the wrong shape; tells all other problems too.
        """
        dims = {
            "patch_embed.proj.weight": 4,
            "pos_embed": 3,
            "cls_token": 3,
            "blocks.0.attn.qkv.weight": 2,
            "blocks.0.mlp.fc1.weight": 2,
            "blocks.0.mlp.fc2.weight": 2,
        }
        optional = {"reg_token": 3, "dist_token": 3, "head.weight": 2}
        problems = []
        for name, number in (dims | optional).items():
            own, shape = tensors.lineage_name(name), tensors.shape(name)
            if name not in tensors and name in dims:
                problems.append(f"{own} is missing")
            elif name in tensors and len(shape) != number:
                problems.append(f"{own} has shape {list(shape)}, wanted {number} dimensions")
        blocks = {int(name.split(".")[1]) for name in tensors.parts if name.startswith("blocks.")}
        gaps = sorted(set(range(1, len(blocks))) - blocks)
        if gaps:
            problems.append(f"block {gaps[0]} is missing")
        if problems:
            tensors.refuse(*problems)
        hidden, inner = tensors.shape("blocks.0.mlp.fc1.weight")[0], tensors.shape("blocks.0.mlp.fc2.weight")[1]
        first_layers = [parts[0] for name, parts in tensors.parts.items() if name.endswith(".mlp.fc1.weight")]
        gated = [name for name, rule in first_layers if rule.swiglu]
        if gated and hidden != 2 * inner:
            tensors.refuse(f"{gated[0]} must have gate and value for {inner} channels")
        embed_dim, in_chans, patch_height, patch_width = tensors.shape("patch_embed.proj.weight")
        return cls(
            embed_dim=embed_dim,
            depth=len(blocks),
            patch_size=(patch_height, patch_width),
            in_chans=in_chans,
            hidden=hidden,
            swiglu=hidden == 2 * inner,
            layer_scale=any(name.endswith(".ls1.gamma") for name in tensors.parts),
            pre_norm="norm_pre.weight" in tensors,
            qkv_bias="blocks.0.attn.qkv.bias" in tensors,
            proj_bias="blocks.0.attn.proj.bias" in tensors,
            num_registers=tensors.shape("reg_token")[1] if "reg_token" in tensors else 0,
            distilled="dist_token" in tensors,
            position_rows=tensors.shape("pos_embed")[1],
            num_classes=tensors.shape("head.weight")[0] if "head.weight" in tensors else 0,
            average="fc_norm.weight" in tensors,
        )
