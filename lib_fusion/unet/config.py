"""The tensors of an LDM U-Net from the numbers of its configuration, as a checkpoint's .yaml gives them."""

from __future__ import annotations

from collections.abc import Sequence

#: Stable Diffusion 1.x, the numbers of v1-inference.yaml.
SD15 = {"model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attention_resolutions": (4, 2, 1),
        "context_dim": 768}  # fmt: skip


def unet_shapes(
    *,
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    context_dim: int,
    in_channels: int = 4,
    out_channels: int = 4,
    transformer_depth: int | Sequence[int] = 1,
    use_linear_in_transformer: bool = False,
    adm_in_channels: int = 0,
) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of the U-Net that LDM's class builds from these arguments (names without prefix).

    ``attention_resolutions`` are down-sampling factors; ``transformer_depth`` is one number or one a level, where 0
    means no transformer; ``adm_in_channels`` > 0 adds SDXL's ``label_emb``.
    """
    levels = len(channel_mult)
    depths = [transformer_depth] * levels if isinstance(transformer_depth, int) else list(transformer_depth)
    emb = model_channels * 4
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    def res_block(name: str, channels: int, out: int) -> None:
        affine(f"{name}.in_layers.0", channels)
        affine(f"{name}.in_layers.2", out, channels, 3, 3)
        affine(f"{name}.emb_layers.1", out, emb)
        affine(f"{name}.out_layers.0", out)
        affine(f"{name}.out_layers.3", out, out, 3, 3)
        if channels != out:
            affine(f"{name}.skip_connection", out, channels, 1, 1)

    def transformer(name: str, dim: int, depth: int) -> None:
        kernel = () if use_linear_in_transformer else (1, 1)
        affine(f"{name}.norm", dim)
        affine(f"{name}.proj_in", dim, dim, *kernel)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for attention, width in (("attn1", dim), ("attn2", context_dim)):
                shapes[f"{block}.{attention}.to_q.weight"] = (dim, dim)
                shapes[f"{block}.{attention}.to_k.weight"] = (dim, width)
                shapes[f"{block}.{attention}.to_v.weight"] = (dim, width)
                affine(f"{block}.{attention}.to_out.0", dim, dim)
            affine(f"{block}.ff.net.0.proj", dim * 8, dim)
            affine(f"{block}.ff.net.2", dim, dim * 4)
            for norm in ("norm1", "norm2", "norm3"):
                affine(f"{block}.{norm}", dim)
        affine(f"{name}.proj_out", dim, dim, *kernel)

    affine("time_embed.0", emb, model_channels)
    affine("time_embed.2", emb, emb)
    if adm_in_channels:
        affine("label_emb.0.0", emb, adm_in_channels)
        affine("label_emb.0.2", emb, emb)
    affine("input_blocks.0.0", model_channels, in_channels, 3, 3)
    skips = [model_channels]
    channels, factor, index = model_channels, 1, 1
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            res_block(f"input_blocks.{index}.0", channels, mult * model_channels)
            channels = mult * model_channels
            if factor in attention_resolutions and depths[level]:
                transformer(f"input_blocks.{index}.1", channels, depths[level])
            skips.append(channels)
            index += 1
        if level != levels - 1:
            affine(f"input_blocks.{index}.0.op", channels, channels, 3, 3)
            skips.append(channels)
            index, factor = index + 1, factor * 2
    res_block("middle_block.0", channels, channels)
    transformer("middle_block.1", channels, depths[-1])
    res_block("middle_block.2", channels, channels)
    index = 0
    for level, mult in reversed(list(enumerate(channel_mult))):
        for i in range(num_res_blocks + 1):
            res_block(f"output_blocks.{index}.0", channels + skips.pop(), mult * model_channels)
            channels, sub = mult * model_channels, 1
            if factor in attention_resolutions and depths[level]:
                transformer(f"output_blocks.{index}.1", channels, depths[level])
                sub = 2
            if level and i == num_res_blocks:
                affine(f"output_blocks.{index}.{sub}.conv", channels, channels, 3, 3)
                factor //= 2
            index += 1
    affine("out.0", channels)
    affine("out.2", out_channels, channels, 3, 3)
    return shapes
