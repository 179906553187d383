"""Weights from and to safetensors: every way in which the files can be wrong, and the sharded paths."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from firm_jax import models
from firm_jax.errors import ConfigError, WeightsError
from firm_jax.interop import hub
from firm_jax.interop.files import WeightFiles
from firm_jax.interop.load import load_params
from firm_jax.interop.mapping import SAME_NAMES, Rule, tensors
from firm_jax.interop.save import save_params
from firm_jax.mesh import make_mesh
from firm_jax.models.layers import Conv, Embedding, LayerNorm, Linear, stack


class Network(nnx.Module):
    """One of each layout: embedding, 4-D convolution, patch convolution kept as a matmul, stack, norm."""

    def __init__(self, rngs):
        self.shared = Embedding(10, 6, rngs=rngs)
        self.conv = Conv(3, 4, 2, rngs=rngs)
        self.patch = Linear(3 * 2 * 2, 8, rngs=rngs)
        self.blocks = stack(lambda rngs: Linear(6, 8, rngs=rngs), 3, rngs)
        self.norm = LayerNorm(6)


RULES = (
    Rule(r"blocks\.kernel", "layers.{layer}.weight"),
    Rule(r"blocks\.bias", "layers.{layer}.bias"),
    Rule(r"patch\.kernel", "patch.weight", layout="patch:3x2x2"),
)
SHARDING = ((r"blocks\.kernel", P("fsdp", "tensor")), (r"(conv|patch)\.kernel", P("fsdp")))
ABSTRACT = nnx.state(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))


def example(dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors of one file, as PyTorch would name and shape them."""
    rng = np.random.default_rng(0)
    wanted = tensors(ABSTRACT, (*RULES, *SAME_NAMES))
    return {tensor.name: rng.normal(size=tensor.shape).astype(dtype) for tensor in wanted}


def write(folder, content: dict, stem="model", shards: int = 1):
    """`content` as one file, or dealt out to so many files with an index."""
    if shards == 1:
        save_file(content, folder / f"{stem}.safetensors")
        return
    names = sorted(content)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: content[name] for name in names[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder, dtype="float32", **options):
    return load_params(ABSTRACT, RULES, folder, dtype=dtype, **options)


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(got), nnx.to_pure_dict(expected))


def test_names_and_layouts_follow_the_rules():
    shapes = {tensor.name: tensor.shape for tensor in tensors(ABSTRACT, (*RULES, *SAME_NAMES))}
    assert shapes == {
        "shared.weight": (10, 6),
        "conv.weight": (4, 3, 2, 2),
        "conv.bias": (4,),
        "patch.weight": (8, 3, 2, 2),
        "patch.bias": (8,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        **{f"layers.{i}.weight": (8, 6) for i in range(3)},
        **{f"layers.{i}.bias": (8,) for i in range(3)},
    }


def test_each_layout_arrives_as_our_layers_read_it(tmp_path):
    content = example()
    write(tmp_path, content)
    params = read(tmp_path)
    np.testing.assert_array_equal(params.shared.embedding[...], content["shared.weight"])
    np.testing.assert_array_equal(params.conv.kernel[...], content["conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params.patch.kernel[...], content["patch.weight"].reshape(8, 12).T)
    np.testing.assert_array_equal(params.blocks.kernel[...][1], content["layers.1.weight"].T)
    np.testing.assert_array_equal(params.norm.scale[...], content["norm.weight"])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_precision_is_read_into_every_other(tmp_path, stored, wanted):
    content = example(stored)
    write(tmp_path, content, shards=3)
    kernel = read(tmp_path, wanted).conv.kernel[...]
    assert kernel.dtype == jnp.dtype(wanted)
    np.testing.assert_array_equal(kernel, content["conv.weight"].astype(jnp.dtype(wanted)).transpose(2, 3, 1, 0))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_one_file_and_shards_read_alike(tmp_path, stem, shards):
    content = example()
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", content)
    write(tmp_path, content, stem, shards)
    assert_equal(read(tmp_path), read(tmp_path / "one"))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (4, 1, 2)])
def test_every_leaf_lands_on_its_shards(tmp_path, sizes, monkeypatch):
    write(tmp_path, example(), shards=2)
    whole = read(tmp_path)
    reads = []
    real = WeightFiles.read

    def recorded(files, name, start, stop):
        reads.extend((name, row) for row in range(start, stop))
        return real(files, name, start, stop)

    monkeypatch.setattr(WeightFiles, "read", recorded)
    mesh = make_mesh(*sizes)
    params = read(tmp_path, sharding_rules=SHARDING, mesh=mesh)
    assert_equal(params, whole)
    divides = [axis if size % mesh.shape[axis] == 0 else None for axis, size in (("fsdp", 6), ("tensor", 8))]
    assert params.blocks.kernel[...].sharding.spec == P(None, *divides)
    assert params.norm.scale[...].sharding.is_fully_replicated
    expected = [(name, row) for name, tensor in example().items() for row in range(len(tensor))]
    assert sorted(reads) == sorted(expected), "each row is read once, however many devices hold it"


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_tensors_that_do_not_fit_are_named(tmp_path, change):
    content = example()
    if change == "missing":
        del content["layers.1.bias"]
        message = r"missing tensors: layers\.1\.bias"
    elif change == "extra":
        content["layers.3.bias"] = content["layers.2.bias"]
        message = r"does not have: layers\.3\.bias"
    else:
        content["conv.weight"] = content["conv.weight"][:, :2].copy()
        message = r"conv\.weight: \(4, 2, 2, 2\) in the file, \(4, 3, 2, 2\) by the config"
    write(tmp_path, content, shards=2)
    with pytest.raises(WeightsError, match=message):
        read(tmp_path)


def test_a_long_list_of_problems_is_cut(tmp_path):
    write(tmp_path, {"other": np.zeros(1, np.float32)})
    with pytest.raises(WeightsError, match=r"and 5 more; tensors that this architecture does not have: other"):
        read(tmp_path)


def test_ignored_buffers_are_left_alone(tmp_path):
    write(tmp_path, example() | {"position_ids": np.arange(4)})
    with pytest.raises(WeightsError, match="position_ids"):
        read(tmp_path)
    read(tmp_path, ignored=("position_ids",))


def test_tied_tensors(tmp_path):
    content, tied = example(), {"head.weight": "shared.weight"}
    write(tmp_path, content | {"head.weight": content["shared.weight"]})
    expected = read(tmp_path, tied=tied)
    write(tmp_path, content | {"head.weight": content["shared.weight"] + 1})
    with pytest.raises(WeightsError, match=r"head\.weight and shared\.weight differ"):
        read(tmp_path, tied=tied)
    content["head.weight"] = content.pop("shared.weight")
    write(tmp_path, content)
    assert_equal(read(tmp_path, tied=tied), expected)


@pytest.mark.fault("damaged-weights")
def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    content = example()
    write(tmp_path, content, shards=2)
    again = sorted(content)[0]
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {again: content[again]}, second)
    with pytest.raises(WeightsError, match=f"{again} stands in both model-00001.* and model-00002"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights")
def test_a_shard_that_is_not_there_is_named(tmp_path):
    write(tmp_path, example(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00003\.safetensors \(for .*not in the folder; fetch it"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights")
def test_an_index_that_lists_too_much_is_an_error(tmp_path):
    write(tmp_path, example(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="do not hold: ghost"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=r"index\.json (is not|holds no) .*; fetch the file again"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights", "escaping-path")
@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_reads_nothing_outside_its_folder(tmp_path, file):
    index = {"weight_map": {"norm.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside of its folder"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float64, ml_dtypes.float8_e4m3fn])
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
    content = example()
    content["conv.bias"] = content["conv.bias"].astype(dtype)
    write(tmp_path, content)
    with pytest.raises(WeightsError, match=r"conv\.bias has dtype (I8|I64|F64|F8_E4M3); readable are"):
        read(tmp_path)


@pytest.mark.fault("damaged-weights")
def test_no_weights_and_two_sets_of_weights_are_errors(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights in .*expected one of"):
        read(tmp_path)
    write(tmp_path, example())
    write(tmp_path, example(), shards=2)
    with pytest.raises(WeightsError, match="several sets of weights"):
        read(tmp_path)


@pytest.mark.parametrize("limit", [5_000_000_000, 200, 1])
def test_saving_is_the_inverse_of_loading(tmp_path, limit):
    content = example()
    write(tmp_path, content)
    params, again = read(tmp_path), tmp_path / "again"
    save_params(params, RULES, again, "model", max_shard_bytes=limit)
    stored = {}
    for file in again.glob("*.safetensors"):
        stored |= load_file(file)
    assert stored.keys() == content.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensor, content[name])
    assert_equal(read(again), params)


@pytest.mark.parametrize("folder_mode, file_mode", [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_what_is_saved_is_as_readable_as_its_folder(tmp_path, folder_mode, file_mode):
    write(tmp_path, example())
    (tmp_path / "again").mkdir()
    (tmp_path / "again").chmod(folder_mode)
    save_params(read(tmp_path), RULES, tmp_path / "again", "model")
    assert (tmp_path / "again" / "model.safetensors").stat().st_mode & 0o777 == file_mode


def test_shards_keep_to_their_limit_and_the_index_adds_up(tmp_path):
    write(tmp_path, example())
    save_params(read(tmp_path), RULES, tmp_path / "shards", "model", max_shard_bytes=400)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 400 for file in files)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in example().values())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_saving_again_leaves_nothing_of_the_save_before(tmp_path):
    write(tmp_path, example())
    params, folder = read(tmp_path), tmp_path / "again"
    for limit in (200, 400, 5_000_000_000, 300):
        save_params(params, RULES, folder, "model", max_shard_bytes=limit)
        assert_equal(read(folder), params)


def test_saving_from_a_mesh_writes_the_same_bytes(tmp_path):
    write(tmp_path, example())
    save_params(read(tmp_path), RULES, tmp_path / "alone", "model")
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        save_params(read(tmp_path, sharding_rules=SHARDING, mesh=mesh), RULES, tmp_path / "mesh", "model")
    alone, sharded = (tmp_path / name / "model.safetensors" for name in ("alone", "mesh"))
    assert alone.read_bytes() == sharded.read_bytes()


def test_saving_in_another_precision(tmp_path):
    write(tmp_path, example())
    save_params(read(tmp_path), RULES, tmp_path / "half", "model", dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in example().items():
        assert stored[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[name], tensor.astype(ml_dtypes.bfloat16))


REMEDIES = ("Looked in", "Hugging Face cache", hub.TOKEN_VARIABLE, ":tiny")


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path


def test_what_is_neither_folder_nor_id_is_named():
    with pytest.raises(WeightsError, match=r"no such model folder: .*/weights/of/mine"):
        hub.resolve("weights/of/mine")


def test_an_id_that_is_not_cached_names_every_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="'no-such-lab/no-such-model' not found") as caught:
        hub.resolve("no-such-lab/no-such-model")  # conftest.py keeps the Hub's client offline
    for remedy in (*REMEDIES, str(tmp_path / "no-such-lab" / "no-such-model")):
        assert remedy in str(caught.value)


def test_a_cached_id_needs_no_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--lab--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--lab--model" / "refs").mkdir()
    (tmp_path / "models--lab--model" / "refs" / "main").write_text("0" * 40)
    from huggingface_hub import snapshot_download

    def with_this_cache(*args, **options):
        return snapshot_download(*args, cache_dir=tmp_path, **options)

    monkeypatch.setattr(hub, "snapshot_download", with_this_cache)
    assert hub.resolve("lab/model") == snapshot


RESOLVE = """
import time
from firm_jax.errors import WeightsError
from firm_jax.interop.hub import resolve
start = time.monotonic()
try:
    resolve("some-lab/some-model")
except WeightsError as error:
    print(error)
print("seconds", time.monotonic() - start)
"""


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_a_hub_out_of_reach_fails_within_seconds(tmp_path, server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if server == "refuses":
            listener.close()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
    message, seconds = done.stdout.split("seconds")
    assert "'some-lab/some-model' not found: it is not cached and could not be fetched" in message
    assert all(remedy in message for remedy in REMEDIES)
    assert float(seconds) < 15


def test_a_dtype_that_weights_are_not_held_in_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype 'fp16' .*float32, bfloat16, float16"):
        models.from_pretrained(tmp_path, dtype="fp16")


def test_the_identity_of_a_model_follows_its_contents_and_not_its_place(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(300, 300)).astype(np.float32)}
    for name in ("here", "there"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "config.json").write_text("{}")
        save_file(weights, tmp_path / name / "part" / "model.safetensors")
    first = hub.identity(tmp_path / "here")
    assert first == hub.identity(tmp_path / "there") and len(first) == 16
    save_file({"w": weights["w"] + 1}, tmp_path / "there" / "part" / "model.safetensors")
    tuned = hub.identity(tmp_path / "there")
    (tmp_path / "here" / "part" / "config.json").write_text('{"layers": 2}')
    assert len({first, tuned, hub.identity(tmp_path / "here")}) == 3
