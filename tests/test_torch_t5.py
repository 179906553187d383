"""T5's encoder against transformers, through files that PyTorch writes and reads."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_parity import assert_same_files, load_folder, randomise, relative_error  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

from firm_jax.errors import ConfigError, WeightsError  # noqa: E402
from firm_jax.mesh import make_mesh, shard_batch  # noqa: E402
from firm_jax.models import from_pretrained, save_pretrained  # noqa: E402
from firm_jax.models.t5 import T5Config, relative_buckets  # noqa: E402

TINY = dict(
    vocab_size=98,
    d_model=24,
    d_kv=6,  # times 6 heads: an inner width that is not d_model
    d_ff=34,
    num_layers=3,
    num_heads=6,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    layer_norm_epsilon=1e-5,
)
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def reference():
    model = transformers.T5EncoderModel(transformers.T5Config(**TINY, feed_forward_proj="gated-gelu")).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    reference.save_pretrained(folder)
    return folder


def token_ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(1, TINY["vocab_size"], (rows, length))


@pytest.mark.parametrize("length", [5, 29])  # the longer one passes the largest distance
def test_hidden_states_equal_transformers(reference, folder, length):
    ids = token_ids(3, length)
    mask = np.arange(length)[None] < np.array([[length], [length - 2], [3]])
    encode = jax.jit(from_pretrained(folder))
    with torch.no_grad():
        whole = reference(torch.from_numpy(ids)).last_hidden_state
        masked = reference(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).last_hidden_state
    assert relative_error(encode(ids), whole) < 1e-5
    assert relative_error(encode(ids, mask), masked) < 1e-5
    assert relative_error(masked, whole.numpy()) > 1e-2, "the mask must matter for this test to say anything"


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (18, 100)])
def test_buckets_equal_transformers_at_every_distance(buckets, distance):
    length = 300
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(length, buckets, distance), expected.numpy())


def test_saving_gives_back_the_same_files(reference, folder, tmp_path):
    save_pretrained(from_pretrained(folder), tmp_path)
    assert_same_files(folder, tmp_path)
    reopened = transformers.T5EncoderModel.from_pretrained(tmp_path)
    for field in (*TINY, "feed_forward_proj", "dense_act_fn", "is_gated_act"):
        assert getattr(reopened.config, field) == getattr(reference.config, field)
    ids = torch.from_numpy(token_ids(2, 5))
    with torch.no_grad():
        assert torch.equal(reopened(ids).last_hidden_state, reference(ids).last_hidden_state)


@pytest.mark.parametrize("stored_as", ["both names", "the alias only"])
def test_the_embedding_may_be_stored_under_its_other_name(folder, tmp_path, stored_as):
    from safetensors.torch import save_file

    tensors = load_folder(folder)
    tensors[EMBEDDING_ALIAS] = tensors["shared.weight"].clone()
    if stored_as == "the alias only":
        del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    shared = from_pretrained(tmp_path).shared.embedding
    np.testing.assert_array_equal(shared, tensors[EMBEDDING_ALIAS].numpy())


def test_sharded_equals_unsharded(folder):
    ids = token_ids(8, 9)
    mask = np.arange(9)[None] < np.arange(2, 10)[:, None]
    run = jax.jit(lambda graphdef, params, ids, mask: nnx.merge(graphdef, params)(ids, mask), static_argnums=0)
    expected = run(*nnx.split(from_pretrained(folder)), ids, mask)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        encoder = from_pretrained(folder, mesh=mesh)
        assert encoder.blocks.q.kernel.sharding.spec == P(None, "fsdp", "tensor")
        assert encoder.blocks.wo.kernel.sharding.spec == P(None, "tensor", "fsdp")
        got = run(*nnx.split(encoder), shard_batch(ids, mesh), shard_batch(mask, mesh))
    assert got.sharding.spec[0] == ("data", "fsdp")
    assert relative_error(got, expected) < 1e-6


HF = T5Config(**TINY).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu' is not supported"),
        ({"feed_forward_proj": None}, "feed_forward_proj"),
        ({"d_kv": None}, "lacks d_kv"),
        ({"relative_attention_num_buckets": 7}, "relative_attention_num_buckets 7"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_a_config_we_cannot_honour_is_an_error(change, message):
    with pytest.raises(ConfigError, match=message):
        T5Config.from_hf(HF | change)


def test_config_survives_a_round_trip():
    assert T5Config.from_hf(json.loads(json.dumps(HF))) == T5Config(**TINY)


def test_a_decoder_in_the_file_is_named(folder, tmp_path):
    """The encoder of a whole T5 is refused with the names that are too many, not read in silence."""
    from safetensors.torch import save_file

    extra = {"decoder.final_layer_norm.weight": torch.ones(TINY["d_model"])}
    save_file(load_folder(folder) | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"decoder\.final_layer_norm\.weight"):
        from_pretrained(tmp_path)
