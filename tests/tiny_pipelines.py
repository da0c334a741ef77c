"""Text-to-image pipelines of real classes at toy size, made here and saved in the real format."""

import json
from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

WORDS = ["red", "cat", "dog", "a"]
MERGES = ["r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>"]
LENGTH = 12


def tiny_tokenizer(folder: Path):
    """A CLIPTokenizer that knows WORDS and spells the rest; its files go to ``folder``."""
    letters = sorted(set("".join(WORDS)))
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    entries += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)


def _text_config(tokenizer, width=16, **options):
    end = len(tokenizer) - 1
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=16, eos_token_id=end, bos_token_id=end - 1, pad_token_id=end,
        **options,
    )  # fmt: skip


def tiny_unet(*, sample_size=8, cross_attention_dim=16, **options):
    return UNet2DConditionModel(
        sample_size=sample_size, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=cross_attention_dim, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def tiny_vae(levels=1):
    return AutoencoderKL(
        block_out_channels=(16,) * levels, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip


def tiny_stable_diffusion(folder: Path, *, vae_levels=1, prediction_type="epsilon", safety_checker=False):
    """Stable Diffusion 1.x/2.x: 8x8 latents of images of 8 · 2^(vae_levels - 1) pixels."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(_text_config(tokenizer)).eval()
    unet, vae = tiny_unet(), tiny_vae(vae_levels)
    parts = {"safety_checker": None, "feature_extractor": None}
    if safety_checker:
        parts = _safety_parts()
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, steps_offset=1, clip_sample=False),
        requires_safety_checker=safety_checker, **parts,
    )  # fmt: skip


def _safety_parts():
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small, vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=16
    )
    extractor = transformers.CLIPImageProcessor(size=8, crop_size=8)
    return {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": extractor}


def tiny_stable_diffusion_xl(folder: Path, *, vae_levels=2, second_width=16):
    """SDXL: two text encoders, pooled text, sizes as a condition."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(_text_config(tokenizer)).eval()
    text_2 = transformers.CLIPTextModelWithProjection(_text_config(tokenizer, second_width)).eval()
    unet = tiny_unet(
        cross_attention_dim=16 + second_width, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(vae_levels), text_encoder=text, text_encoder_2=text_2, tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def tiny_t5_tokenizer():
    """A T5Tokenizer that knows WORDS."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -2.0)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def _tiny_t5(tokenizer):
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def _tiny_vae_16(levels):
    """As the autoencoders of flow matching models: shifted latents, no convolutions between."""
    return AutoencoderKL(
        block_out_channels=(16,) * levels, norm_num_groups=8, latent_channels=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip


def tiny_stable_diffusion_3(folder: Path, *, vae_levels=2, t5=False, **options):
    """Stable Diffusion 3: 8x8 latents in tokens of 2x2, two CLIPs and perhaps a T5."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    texts = [transformers.CLIPTextModelWithProjection(_text_config(tokenizer)).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=6, **options,
    )  # fmt: skip
    tokenizer_3 = tiny_t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_tiny_vae_16(vae_levels),
        text_encoder=texts[0], tokenizer=tokenizer, text_encoder_2=texts[1], tokenizer_2=tokenizer,
        text_encoder_3=_tiny_t5(tokenizer_3) if t5 else None, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def tiny_flux(folder: Path, *, vae_levels=2, guidance_embeds=True):
    """FLUX: squares of 2x2 latents, CLIP's pooled text and T5's tokens."""
    tokenizer, tokenizer_2 = tiny_tokenizer(folder), tiny_t5_tokenizer()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=_tiny_vae_16(vae_levels), tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=transformers.CLIPTextModel(_text_config(tokenizer)).eval(), text_encoder_2=_tiny_t5(tokenizer_2),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip
