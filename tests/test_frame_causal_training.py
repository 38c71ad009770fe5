"""Training of a Wan that is causal over frames: what it sees is what sampling shows it."""

import json

import decord
import pytest
import torch
from safetensors.torch import load_file
from test_video import wan_run
from tiny import disturb, tiny_clip_cache, tiny_wan
from tiny_sampling import set_of

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.config import DistillConfig, StageConfig
from mhla_gen.config.previews import PreviewConfig
from mhla_gen.data import load_data
from mhla_gen.distillation import distill
from mhla_gen.errors import UserError
from mhla_gen.sampling import sample
from mhla_gen.training import train
from mhla_gen.training.build import build_task
from mhla_gen.training.clip_objectives import ChunkMatching
from mhla_gen.training.wan_conditions import WanConditions

CAUSAL = {"mhla": MHLAConfig(layout=(2, 2, 2), causal_frames=2)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_clip_cache(tmp_path_factory.mktemp("clips"))


def test_first_chunks_are_clean_and_the_others_have_levels_of_their_own():
    matching = ChunkMatching(shift=3.0, chunk_frames=2, num_chunks=4)
    times = matching.draw_times(4000, torch.Generator().manual_seed(0))
    assert times.shape == (4000, 4) and times.dtype == torch.float32
    clean = times == 0
    assert not clean[:, -1].any() and clean.sort(dim=1, descending=True).values.equal(clean)
    # Any number of clean chunks is as likely as any other.
    shares = torch.bincount(clean.sum(1), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.03)
    noisy = times[clean.sum(1) == 0]
    assert torch.corrcoef(noisy.T).triu(1).abs().max() < 0.1


def test_noise_and_loss_go_by_the_level_of_a_frame():
    matching = ChunkMatching(chunk_frames=2, num_chunks=4, min_snr_gamma=5.0)
    samples, noise = torch.randn(2, 2, 3, 5, 2, 2).unbind()
    # Five frames have three chunks: the last three of four.
    times = torch.tensor([[0.1, 0.0, 0.5, 0.25], [0.0, 0.0, 0.0, 0.75]])
    noisy = matching.noisy(samples, noise, times)
    assert noisy[:, :, :2].equal(samples[:, :, :2])
    torch.testing.assert_close(noisy[0, :, 2:4], (samples + noise)[0, :, 2:4] / 2)
    torch.testing.assert_close(noisy[1, :, 4], 0.25 * samples[1, :, 4] + 0.75 * noise[1, :, 4])
    wrong = noise - samples
    wrong[:, :, :2] += 7  # Clean: nobody asks for them.
    wrong[0, :, 2:4] += 2
    wrong[1, :, 4] += 1
    found = matching.losses(wrong, samples, noise, times)
    # σ² min(SNR, 5): two frames of three at 0.5, and the one noisy frame at 0.75.
    expected = torch.tensor([2 / 3 * 4 * 0.25 * 1, 1 * 0.5625 * (0.25 / 0.75) ** 2])
    torch.testing.assert_close(found, expected)


def test_training_sees_a_chunk_as_sampling_shows_it():
    torch.manual_seed(0)
    model = disturb(mhla_gen.inject(tiny_wan(), CAUSAL["mhla"]))
    prompts = WanConditions(torch.zeros(7, 16), (1, 2, 2), True, chunk_frames=2)
    matching = ChunkMatching(chunk_frames=2, num_chunks=3)
    samples, noise, text = (
        torch.randn(1, 16, 5, 4, 6),
        torch.randn(1, 16, 5, 4, 6),
        torch.randn(1, 7, 16),
    )
    times = torch.tensor([[0.0, 0.6, 0.9]])
    noisy = matching.noisy(samples, noise, times)
    with torch.no_grad():
        found = prompts.predict(
            model, noisy, matching.timesteps(times), {"prompt_embeds": text}, torch.tensor([False])
        )
        state = mhla_gen.ClipState(model)
        clean = samples[:, :, :2]
        state(clean, torch.zeros(1), encoder_hidden_states=text, append=True)
        sampled = state(noisy[:, :, 2:4], torch.tensor([600.0]), encoder_hidden_states=text)
    torch.testing.assert_close(found[:, :, 2:4], sampled, rtol=1e-4, atol=1e-5)


def test_a_run_learns_previews_and_samples_longer_clips(cache, tmp_path):
    samples = PreviewConfig(num_images=1, num_inference_steps=2, guidance_scale=2.0)
    changes = {"sample_every": 4, "samples": samples, "max_steps": 4, "batch_size": 4}
    config = wan_run(tmp_path / "run", cache, model=CAUSAL, checkpoint_every=4, **changes)
    task = build_task(config, load_data(config.data))
    assert (task.objective.chunk_frames, task.objective.num_chunks) == (2, 2)
    train(config)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] > 0 for line in log)
    assert (tmp_path / "run" / "previews" / "clip-0000004-00.mp4").is_file()
    state = load_file(
        tmp_path / "run" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert state["blocks.0.attn1.mhla.mixing"].shape == (2, 4, 4)
    # Clips of the cache have 9 frames.
    options = {"prompts": "up", "num_frames": 29, "guidance_scale": 2.0, "samples_per_prompt": 1}
    embeds = next((tmp_path / "run").rglob("*embeds*.safetensors"))
    options["prompt_embeds"] = str(embeds)
    sample(set_of(tmp_path / "set", tmp_path / "run", **options))
    (clip,) = (tmp_path / "set" / "videos").iterdir()
    assert len(decord.VideoReader(str(clip))) == 29


def test_a_distillation_makes_a_causal_model_of_a_softmax_one(cache, tmp_path):
    tiny_wan().save_pretrained(tmp_path / "teacher")
    stages = [StageConfig(kind="layers", steps=1), StageConfig(kind="output", steps=1)]
    distillation = DistillConfig(teacher=str(tmp_path / "teacher"), stages=stages)
    config = wan_run(tmp_path / "run", cache, model=CAUSAL, distill=distillation)
    found = mhla_gen.MHLAWanTransformer3DModel.from_pretrained(distill(config) / "transformer")
    assert {row.kind for row in mhla_gen.summary(found)} == {"causal mhla"}


@pytest.mark.parametrize("wan", [{"expert": "low_noise"}, {"times_of_tokens": False}])
def test_what_cannot_be_learned_so_is_refused(wan, cache, tmp_path):
    config = wan_run(tmp_path / "run", cache, wan, CAUSAL)
    with pytest.raises(UserError, match="causal_frames"):
        build_task(config, load_data(config.data))
