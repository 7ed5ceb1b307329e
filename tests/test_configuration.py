"""Section 1: the Config."""

import json
import math
from dataclasses import asdict, replace

import make_checkpoint
import pytest

import sd


def test_defaults_are_stable_diffusion_v1s():
    """As config.json of the released SD v1.5 has them."""
    config, configs = sd.Config(), make_checkpoint.configs()
    text_encoder, vae, unet, scheduler = (
        configs[part] for part in ("text_encoder", "vae", "unet", "scheduler")
    )
    assert config.image_size == unet["sample_size"] * config.downscale == vae["sample_size"]
    assert config.vocabulary == ()
    assert config.vocab_size == text_encoder["vocab_size"]
    assert config.text_length == text_encoder["max_position_embeddings"]
    assert config.text_dim == text_encoder["hidden_size"] == unet["cross_attention_dim"]
    assert config.text_layers == text_encoder["num_hidden_layers"]
    assert config.text_heads == text_encoder["num_attention_heads"]
    assert config.latent_channels == vae["latent_channels"] == unet["in_channels"]
    assert config.latent_scale == vae["scaling_factor"]
    assert config.vae_channels == tuple(vae["block_out_channels"])
    assert config.vae_blocks == vae["layers_per_block"]
    assert config.unet_channels == tuple(unet["block_out_channels"])
    assert config.unet_attention == tuple("CrossAttn" in block for block in unet["down_block_types"])
    assert config.unet_blocks == unet["layers_per_block"]
    assert config.unet_heads == unet["attention_head_dim"]
    assert config.norm_groups == vae["norm_num_groups"]
    assert config.timesteps == scheduler["num_train_timesteps"]
    assert (config.beta_start, config.beta_end) == (scheduler["beta_start"], scheduler["beta_end"])


@pytest.mark.parametrize("change", [
    {}, {"unet_channels": (64, 128), "unet_attention": (True, False), "vocabulary": ("[UNK]", "é")},
])  # fmt: skip
def test_json_round_trip(change):
    """JSON has lists for tuples, and a Config is hashable only if it turns them into tuples."""
    config = replace(sd.Config(), **change)
    again = sd.Config(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)


BAD_VALUES = {
    "image_size": [0, -8, math.nan], "vocab_size": [0, -1, 513, 10**9], "text_length": [0, 1, -77],
    "text_dim": [0, -768, 767, "wide"], "text_layers": [0, -1, 10**9], "text_heads": [0, -12, 7],
    "latent_channels": [0, -4], "latent_scale": [0, -0.18215, math.nan, math.inf],
    "vae_channels": [(), (128, 0), (128, -32), (128, math.nan), (128.0, 256.0), (False, 128), (33,), (128,) * 20_000],
    "vae_blocks": [0, -2, 10**9],
    "unet_channels": [(), (320, 640, 1280, 0), (320, 640, 1280, -32), (320, 640, 1280, 1284), (320,) * 20_000],
    "unet_attention": [(), (True,), (True,) * 5, (True,) * 20_000], "unet_blocks": [0, -2, 10**9],
    "unet_heads": [0, -8, 7], "norm_groups": [0, -32, 31], "timesteps": [0, -1000, 10**9],
    "beta_start": [0, -0.1, 0.013, math.nan], "beta_end": [0.0008, 1, 2, math.nan],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused_in_one_line(name):
    for value in BAD_VALUES[name]:
        with pytest.raises(ValueError) as caught:
            sd.Config(**{name: value})
        message = str(caught.value)
        assert "\n" not in message and len(message) < 200, (value, message)


def test_an_odd_number_of_channels_for_the_timestep_embedding_is_refused():
    """The embedding has as many cosines as sines."""
    with pytest.raises(ValueError):
        sd.Config(
            unet_channels=(33,), unet_attention=(True,), unet_heads=3, vae_channels=(33,), norm_groups=3
        )
