"""Folders that PyTorch's own `save_pretrained` writes, and ours as PyTorch reads them: precisions, shards, meshes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch_parity import load_folder, randomise  # noqa: E402

from firm_jax.errors import ConfigError, WeightsError  # noqa: E402
from firm_jax.interop.save import save_params  # noqa: E402
from firm_jax.mesh import make_mesh  # noqa: E402
from firm_jax.models import from_pretrained, save_pretrained  # noqa: E402

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEM, INDEX = "model", "model.safetensors.index.json"


def reference(dtype=torch.float32):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    model = transformers.T5EncoderModel(config).eval()
    randomise(model)
    return model.to(dtype)


def assert_same_state(ours, theirs):
    expected = theirs.state_dict()
    got = ours.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pytorch_to_us_to_pytorch(tmp_path, precision, shard_size):
    reference(PRECISIONS[precision]).save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (tmp_path / "theirs" / INDEX).exists() == (shard_size == "4KB")
    network = from_pretrained(tmp_path / "theirs", dtype=precision)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(network))} == {jnp.dtype(precision)}
    save_pretrained(network, tmp_path / "ours")
    # Both opened from files, because transformers keeps some of T5's matrices in float32 when it opens float16.
    ours, theirs = (transformers.T5EncoderModel.from_pretrained(tmp_path / side) for side in ("ours", "theirs"))
    assert ours.dtype == PRECISIONS[precision]
    assert_same_state(ours, theirs)


def test_pytorch_reads_our_shards(tmp_path):
    model = reference()
    model.save_pretrained(tmp_path)
    network = from_pretrained(tmp_path)
    save_pretrained(network, tmp_path / "ours")
    params = nnx.state(network, nnx.Param)
    save_params(params, network.weight_rules(network.config), tmp_path / "ours", STEM, max_shard_bytes=5000)
    assert (tmp_path / "ours" / INDEX).exists()
    assert not (tmp_path / "ours" / "model.safetensors").exists()
    assert_same_state(transformers.T5EncoderModel.from_pretrained(tmp_path / "ours"), model)


def test_a_mesh_changes_where_the_weights_are_and_nothing_else(tmp_path):
    reference().save_pretrained(tmp_path, max_shard_size="4KB")
    alone = from_pretrained(tmp_path)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        sharded = from_pretrained(tmp_path, mesh=mesh)
        save_pretrained(sharded, tmp_path / "ours")
    for ours, expected in zip(*(jax.tree.leaves(nnx.state(m)) for m in (sharded, alone)), strict=True):
        assert len(ours.sharding.device_set) == 8
        np.testing.assert_array_equal(ours, expected)
    assert sharded.blocks.q.kernel[...].addressable_shards[0].data.shape == (2, 8, 8)
    ours, theirs = load_folder(tmp_path / "ours"), load_folder(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_without_config_or_with_another_class_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        from_pretrained(tmp_path)
    config.write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="names no class"):
        from_pretrained(tmp_path)
    config.write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="'BertModel' are not supported"):
        from_pretrained(tmp_path)


def test_weights_of_another_size_than_the_config_are_an_error(tmp_path):
    reference().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3, "d_ff": 20}))
    with pytest.raises(WeightsError, match=r"missing tensors: encoder\.block\.2.*another shape: .*wi_0.*\(24, 16\)"):
        from_pretrained(tmp_path)
