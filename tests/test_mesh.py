"""The mesh, the rules that place parameters on it, and the names of what the package ships."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax import embedded
from firm_jax.embedded import embedded_path
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.mesh import batch_size, make_mesh, on_mesh, replicate, shard_batch, to_host
from firm_jax.sharding import partition_spec, path_name, shardings

RULES = ((r"to_q\.kernel$", P("fsdp", "tensor")), (r"\.kernel$", P("fsdp", None)))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "sizes, expected",
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((2, 2, 2), (2, 2, 2))],
)
def test_one_size_may_be_left_open(sizes, expected):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == expected and tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Explicit,) * 3
    assert set(mesh.devices.ravel()) == set(jax.devices())


@pytest.mark.parametrize(
    "sizes, named",
    [
        ((3, -1, 1), r"8 devices cannot be divided by 3; change mesh\.data"),
        ((2, 1, 1), "needs 2 devices but 8 are present"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
        ((-2, 1, 1), "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, named):
    with pytest.raises(ConfigError, match=named):
        make_mesh(*sizes)


def test_a_batch_is_split_over_data_and_fsdp(mesh):
    assert batch_size(mesh) == 4 and batch_size(None) == 1
    rows, columns = np.arange(24).reshape(8, 3), np.arange(24).reshape(3, 8)
    by_row, by_column = shard_batch(rows, mesh), shard_batch(columns, mesh, axis=1)
    assert by_row.sharding.spec == P(("data", "fsdp")) and by_row.addressable_shards[0].data.shape == (2, 3)
    assert by_column.addressable_shards[0].data.shape == (3, 2)
    np.testing.assert_array_equal(to_host(by_row), rows)
    np.testing.assert_array_equal(to_host(by_column), columns)


def test_without_a_mesh_there_is_nothing_to_split():
    with on_mesh(None):
        np.testing.assert_array_equal(shard_batch({"a": np.arange(3)}, None)["a"], np.arange(3))
        np.testing.assert_array_equal(replicate(np.arange(3), None), np.arange(3))


def test_replicated_arrays_are_whole_on_every_device(mesh):
    whole = replicate(np.arange(5), mesh)
    assert len(whole.addressable_shards) == 8 and all(shard.data.shape == (5,) for shard in whole.addressable_shards)


def test_the_first_rule_that_matches_decides_and_layers_stay_whole(mesh):
    assert partition_spec("blocks.to_q.kernel", (5, 4, 6), RULES, mesh) == P(None, "fsdp", "tensor")
    assert partition_spec("to_out.kernel", (4, 6), RULES, mesh) == P("fsdp", None)
    assert partition_spec("norm.scale", (4,), RULES, mesh) == P(None)


def test_an_axis_that_does_not_divide_is_left_out(mesh):
    assert partition_spec("to_q.kernel", (3, 6), RULES, mesh) == P(None, "tensor")
    assert partition_spec("to_q.kernel", (4, 7), RULES, mesh) == P("fsdp", None)


def test_every_leaf_of_a_tree_gets_its_sharding(mesh):
    tree = {"blocks": {"to_q": {"kernel": np.zeros((3, 4, 4)), "bias": np.zeros((3, 4))}}}
    found = shardings(tree, RULES, mesh)
    assert found["blocks"]["to_q"]["kernel"] == NamedSharding(mesh, P(None, "fsdp", "tensor"))
    assert found["blocks"]["to_q"]["bias"].is_fully_replicated
    [(path, _), _] = jax.tree_util.tree_leaves_with_path({"a": [{"b": 1}, 2]})
    assert path_name(path) == "a.0.b"


def test_embedded_names_lead_into_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    (tmp_path / "sd3").mkdir()
    assert embedded_path("embedded:sd3") == tmp_path / "sd3"
    assert embedded_path("stabilityai/stable-diffusion-3.5-medium") is None
    with pytest.raises(WeightsError, match=r"no part 'embedded:critic'; it ships embedded:sd3"):
        embedded_path("embedded:critic")
