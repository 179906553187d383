"""CLIP's text encoder against transformers, through files that PyTorch writes and reads."""

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_parity import assert_same_files, randomise, relative_error  # noqa: E402

from firm_jax.errors import ConfigError  # noqa: E402
from firm_jax.mesh import make_mesh, shard_batch  # noqa: E402
from firm_jax.models import from_pretrained, save_pretrained  # noqa: E402
from firm_jax.models.clip import CLIPTextConfig  # noqa: E402

TINY = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    projection_dim=20,
    vocab_size=99,
    max_position_embeddings=13,
)
VARIANTS = {  # the two encoders of Stable Diffusion 3, and the two ways that configs name the end of text
    "clip_l": dict(hidden_act="quick_gelu", eos_token_id=2, pad_token_id=1),
    "clip_bigg": dict(hidden_act="gelu", eos_token_id=98, pad_token_id=0),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.CLIPTextConfig(**TINY, **VARIANTS[request.param])
    reference = transformers.CLIPTextModelWithProjection(config).eval()
    randomise(reference)
    reference.save_pretrained(folder)
    return reference, folder


def token_ids(rows: int, length: int, end: int = 98) -> np.ndarray:
    """Random texts of different lengths: the end token once or, as CLIP-L pads, repeated to the end."""
    ids = np.random.default_rng(rows).integers(3, end - 1, (rows, length))
    for row in range(rows):
        stop = 2 + row % (length - 2)
        ids[row, stop] = end
        ids[row, stop + 1 :] = end if row % 2 else 0
    return ids


@pytest.mark.parametrize("length", [13, 7])
def test_all_outputs_equal_transformers(pair, length):
    reference, folder = pair
    ids = token_ids(5, length)
    output = jax.jit(from_pretrained(folder))(ids)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), output_hidden_states=True)
    assert relative_error(output.last, expected.last_hidden_state) < 1e-5
    assert relative_error(output.penultimate, expected.hidden_states[-2]) < 1e-5
    assert relative_error(output.pooled, expected.text_embeds) < 1e-5


def test_saving_gives_back_the_same_files(pair, tmp_path):
    reference, folder = pair
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    reopened = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path)
    for field in (*TINY, "hidden_act", "eos_token_id", "layer_norm_eps"):
        assert getattr(reopened.config, field) == getattr(reference.config, field)


def test_the_position_buffer_of_old_files_is_no_parameter(pair, tmp_path):
    from safetensors.torch import save_file
    from torch_parity import load_folder

    _, folder = pair
    buffer = {"text_model.embeddings.position_ids": torch.arange(13)[None]}
    save_file(load_folder(folder) | buffer, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    got, expected = (nnx.state(from_pretrained(where)) for where in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_sharded_equals_unsharded(pair):
    _, folder = pair
    ids = token_ids(8, 11)
    run = jax.jit(lambda graphdef, params, ids: nnx.merge(graphdef, params)(ids), static_argnums=0)
    expected = run(*nnx.split(from_pretrained(folder)), ids)
    mesh = make_mesh(data=4, fsdp=2)
    with jax.set_mesh(mesh):
        got = run(*nnx.split(from_pretrained(folder, mesh=mesh)), shard_batch(ids, mesh))
    for ours, alone in zip(got, expected, strict=True):
        assert ours.sharding.spec[0] == ("data", "fsdp")
        assert relative_error(ours, alone) < 1e-6


def test_more_tokens_than_positions_is_an_error(pair):
    _, folder = pair
    with pytest.raises(ConfigError, match="14 tokens, but it has 13 positions"):
        from_pretrained(folder)(token_ids(1, 14))


HF = CLIPTextConfig(**TINY).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"projection_dim": None}, "lacks projection_dim"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be one integer"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_a_config_we_cannot_honour_is_an_error(change, message):
    with pytest.raises(ConfigError, match=message):
        CLIPTextConfig.from_hf(HF | change)


def test_config_survives_a_round_trip():
    config = CLIPTextConfig(**TINY, hidden_act="gelu", eos_token_id=2, layer_norm_eps=1e-6)
    assert CLIPTextConfig.from_hf(config.to_hf()) == config
