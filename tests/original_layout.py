"""A tiny Stable Diffusion under the names that its weights have in the original code."""

import torch

UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""The UNet of :func:`tiny_pipelines.tiny_unet`: diffusers' modules and the original ones."""

UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip

VAE = {
    "encoder.down_blocks.0.resnets.": "encoder.down.0.block.",
    "encoder.down_blocks.1.resnets.": "encoder.down.1.block.",
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "decoder.up_blocks.0.resnets.": "decoder.up.1.block.", "decoder.up_blocks.1.resnets.": "decoder.up.0.block.",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
"""Parts of names in the autoencoder of two levels, which counts the decoder's from the other end."""


OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip
"""Parts of names in OpenCLIP's text encoder, which has queries, keys and values in one."""


def as_clip(encoder, prefix):
    """A text encoder of CLIP, which has transformers' own names in those files."""
    state = encoder.state_dict()
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": v for name, v in state.items()}


def as_open_clip(encoder, prefix):
    """A text encoder under OpenCLIP's names."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    found = {"text_projection": state.pop("text_projection.weight", torch.eye(16)).T}
    for name in [name for name in state if "self_attn.q_proj" in name]:
        joined = torch.cat([state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
    for name, value in state.items():
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return {f"{prefix}model.{name}": value for name, value in found.items()}


def texts_of(pipeline, family):
    """The text side of a file of Stable Diffusion 1, 2 or XL."""
    first = pipeline.text_encoder
    if family == "xl":
        second = as_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.")
        return as_clip(first, "conditioner.embedders.0.") | second
    return as_open_clip(first, "cond_stage_model.") if family == "2" else as_clip(first, "cond_stage_model.")


def in_original_layout(pipeline, family="1"):
    """All weights of a tiny Stable Diffusion under the names of the original code, half precision as published."""
    found = {}
    for name, value in pipeline.unet.state_dict().items():
        module = max((module for module in UNET if name.startswith(module + ".")), key=len)
        rest = name[len(module) + 1 :]
        if "resnets" in module:
            part, kind = rest.split(".")
            rest = f"{UNET_RESNET[part]}.{kind}"
        found[f"model.diffusion_model.{UNET[module]}.{rest}"] = value
    for name, value in pipeline.vae.state_dict().items():
        original = name
        for theirs, ours in VAE.items():
            original = original.replace(theirs, ours)
        convolved = "attn_1" in original and original.endswith("weight") and value.ndim == 2
        found[f"first_stage_model.{original}"] = value[:, :, None, None] if convolved else value
    found |= texts_of(pipeline, family)
    return {name: value.half().contiguous() for name, value in found.items()}
