"""Captioned latents in memory for every tiny model that `mhla_gen.calls` can call."""

import torch
from families import FAMILIES
from tiny import tiny_wan_autoencoder

from mhla_gen.calls import call_class

# Changes of a tiny model so that its pipeline's call fits, and the sizes of its latents.
CALLED = {
    "flux": ({"in_channels": 16, "guidance_embeds": True}, (8, 12)),
    "flux2": ({"in_channels": 16, "guidance_embeds": True}, (4, 6)),
    "hunyuan_dit": ({}, (8, 12)),
    "pixart": ({}, (8, 12)),
    "qwen_image": ({"in_channels": 16, "out_channels": 4}, (8, 12)),
    "sana": ({}, (4, 6)),
    "sd3": ({}, (8, 12)),
    "z_image": ({"axes_lens": [1024, 32, 32]}, (8, 12)),
    "cogvideox": ({}, (3, 10, 12)),
    "cosmos": ({}, (3, 10, 12)),
    "hunyuan_video": ({"guidance_embeds": True}, (3, 10, 12)),
    "hunyuan_video15": ({"in_channels": 9}, (3, 5, 6)),
    "kandinsky5": ({}, (3, 10, 12)),
    "ltx": ({}, (3, 5, 6)),
    "ltx2": ({}, (3, 5, 6)),
    "mochi": ({}, (3, 10, 12)),
    "sana_video": ({}, (3, 8, 12)),
    "skyreels_v2": ({}, (3, 10, 12)),
    "wan": ({}, (3, 10, 12)),
    "wan_animate": ({}, (3, 10, 12)),
    "wan_vace": ({"vace_in_channels": 96}, (3, 4, 4)),
}


class CaptionedLatents:
    """Latents of one shape with random captions of several lengths; see `TrainingData`."""

    class_names = None

    def __init__(self, call, config, sizes, count=4, tokens=7):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        shape = (call.channels(config), *sizes)
        self.buckets, self.sample_shapes = (range(count),), (shape,)
        self.batch = {"samples": randn(count, *shape)}
        for row in call.embedded(config).values():
            long = {} if row.tokens is None else {"length": length_of(row, tokens)}
            if row.channels is None:
                lengths = torch.arange(count) % 3 + long["length"] - 2
                mask = torch.arange(long["length"]) < lengths[:, None]
                self.batch[row.name] = mask.long()
            else:
                self.batch[row.name] = randn(count, *long.values(), config[row.channels])
        if call.beside:
            frames, height, width = sizes
            self.batch["reference_latents"] = randn(
                count, config.in_channels - shape[0], frames, height, width
            )
            self.batch["pose_latents"] = randn(count, shape[0], frames - 1, height, width)
            self.batch["face_pixels"] = randn(count, 3, 4 * (frames - 2) + 1, 16, 16)
        self.empty_prompt = {
            name: torch.zeros_like(value[0]) if value.is_floating_point() else value[0]
            for name, value in self.batch.items()
            if name != "samples" and name not in call.beside
        }

    def __len__(self):
        return len(self.buckets[0])

    def read(self, indices):
        return {name: value[list(indices)] for name, value in self.batch.items()}

    def caption(self, index):
        return f"caption {index}"

    def describe(self, index):
        return f"sample {index}"


def length_of(row, tokens):
    """HunyuanDiT has learned places, so that its captions have one length."""
    names = ("prompt_embeds_2", "prompt_attention_mask_2", "prompt_embeds_mask_2")
    known = dict.fromkeys(names, 4) | {"image_embeds": 5}
    return known.get(row.name, tokens)


def called(name, **further):
    """A tiny model that its pipeline can call, how it is called, and data for it."""
    changes, sizes = CALLED[name]
    make = FAMILIES[name][0]
    model = make(**changes | further)
    kind = call_class(model)
    tokens = 3 if name == "hunyuan_dit" else 7
    data = CaptionedLatents(kind, model.config, sizes, tokens=tokens)
    if name == "wan_vace":
        data.autoencoder = tiny_wan_autoencoder
    return model, kind, data


def autoencoder_of(name):
    """Wan VACE's call asks the autoencoder for the latents of a grey clip."""
    return {"vae": tiny_wan_autoencoder()} if name == "wan_vace" else {}
