"""Tiny autoencoders of every class that a family's pipeline has."""

import diffusers
import torch

FOUR = (8, 8, 8, 8)
NO_STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def autoencoder(kind=diffusers.AutoencoderKL, **changes):
    arguments = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": FOUR,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    } | changes
    return kind(**{name: value for name, value in arguments.items() if value is not None})


def shifted():
    return autoencoder(shift_factor=0.1)


def autoencoder_of_qwen():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **NO_STATISTICS,
    )


def autoencoder_of_cogvideox():
    return autoencoder(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )


def autoencoder_of_hunyuan():
    kind = diffusers.AutoencoderKLHunyuanVideo
    return autoencoder(kind, down_block_types=None, up_block_types=None)


def autoencoder_of_mochi(channels=4):
    return diffusers.AutoencoderKLMochi(
        latent_channels=channels,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.1] * channels,
        latents_std=[0.8] * channels,
    )


def autoencoder_of_ltx(kind=diffusers.AutoencoderKLLTXVideo, **changes):
    vae = kind(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.6,
        **changes,
    )
    vae.latents_mean.uniform_()
    vae.latents_std.uniform_(0.5, 2)
    return vae.eval()


def autoencoder_of_flux2():
    vae = autoencoder(diffusers.AutoencoderKLFlux2)
    torch.nn.init.uniform_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    return vae.eval()


def autoencoder_of_sana():
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        scaling_factor=0.4,
    ).eval()


def autoencoder_of_hunyuan15():
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1
    ).eval()
