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
    text, vae, unet = configs["text_encoder"], configs["vae"], configs["unet"]
    assert asdict(config) == {
        "image_size": vae["sample_size"], "vocab_size": text["vocab_size"], "vocabulary": (),
        "text_length": text["max_position_embeddings"], "text_dim": text["hidden_size"],
        "text_layers": text["num_hidden_layers"], "text_heads": text["num_attention_heads"],
        "latent_channels": vae["latent_channels"], "latent_scale": vae["scaling_factor"],
        "vae_channels": tuple(vae["block_out_channels"]), "vae_blocks": vae["layers_per_block"],
        "unet_channels": tuple(unet["block_out_channels"]), "unet_blocks": unet["layers_per_block"],
        "unet_attention": tuple("CrossAttn" in kind for kind in unet["down_block_types"]),
        "unet_heads": unet["attention_head_dim"], "norm_groups": vae["norm_num_groups"],
        "timesteps": configs["scheduler"]["num_train_timesteps"],
        "beta_start": configs["scheduler"]["beta_start"], "beta_end": configs["scheduler"]["beta_end"],
        "prediction": "epsilon",
    }  # fmt: skip
    assert config.downscale == vae["sample_size"] / unet["sample_size"]


@pytest.mark.parametrize("change", [
    {}, {"unet_channels": (64, 128), "unet_attention": (True, False)},
    {"vocabulary": ("[UNK]", "é"), "vocab_size": 2, "latent_scale": 1},
])  # fmt: skip
def test_json_round_trip(change):
    """JSON has lists for tuples; only with tuples is a Config hashable."""
    config = replace(sd.Config(), **change)
    again = sd.Config(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)


BAD_VALUES = {
    "image_size": [0, -8, math.nan, "100", 64.0, None, True, 1e400, (64,), {}],
    "vocab_size": [0, -1, 513, 10**9], "text_length": [0, 1, -77],
    "text_dim": [0, -768, 767, "wide"], "text_layers": [0, -1, 10**9], "text_heads": [0, -12, 7],
    "latent_channels": [0, -4], "latent_scale": [0, -0.18215, math.nan, math.inf],
    "vae_channels": [(), (128, 0), (-32, 128), (math.nan,), (128.0,), (False, 128), (33,), (128,) * 20_000, 8,
        "ab", {8: 1}, None],
    "vae_blocks": [0, -2, 10**9],
    "unet_channels": [(), (320, 320, 320, 0), (320, 320, 320, -32), (320,) * 3 + (324,), (320,) * 20_000],
    "unet_attention": [(), (True,), (True,) * 5, (True,) * 20_000, (2, 1, 0, 0), (1.0,) * 4, True],
    "unet_blocks": [0, -2, 10**9],
    "unet_heads": [0, -8, 7], "norm_groups": [0, -32, 31], "timesteps": [0, -1000, 10**9],
    "beta_start": [0, -0.1, 1e-300, 0.013, math.nan], "beta_end": [0.0008, 0.021, 1, 2, math.nan],
    "vocabulary": [5, True, "ab", None, {"a": 1}, ["a", 1]],
    "prediction": ["sample", "", None, 1, ["epsilon"]],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused_in_one_line(name):
    for value in BAD_VALUES[name]:
        with pytest.raises(ValueError, match="|".join(BAD_VALUES)) as caught:  # it names a field
            sd.Config(**{name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_odd_channels_at_the_first_level_are_refused():
    """The timestep embedding has as many cosines as sines."""
    sizes = {"vae_channels": (33,), "unet_attention": (True,), "unet_heads": 3, "norm_groups": 3}
    with pytest.raises(ValueError, match="unet_channels"):
        sd.Config(unet_channels=(33,), **sizes)
    sd.Config(unet_channels=(66,), **sizes)
