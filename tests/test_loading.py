"""Loading large or damaged checkpoints: how much memory it takes, and what is said about a file that is broken."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny_pipeline import tiny_generator

from firm_jax import Critic, Generator
from firm_jax.embedded import embedded_path
from firm_jax.errors import WeightsError
from firm_jax.interop import files, load
from firm_jax.interop.mapping import Rule, Tensor
from firm_jax.mesh import make_mesh
from firm_jax.models.layers import Linear, stack
from firm_jax.models.quantize import quantize_linears, quantized

ROOT = Path(__file__).parents[1]

# Memory


@pytest.mark.fault("memory-of-loading")
def test_a_checkpoint_is_never_in_the_host_s_memory_as_a_whole():
    # 600 MB of files and half of it on the devices; the largest tensor has 13 MB.
    settings = "--gigabytes 0.6 --width 1024 --vocabulary 2048 --stored float32 --allowance 150 --mesh fsdp=4,tensor=2"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", *settings.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "GB/s" in done.stdout, done.stdout + done.stderr


LAYERS, WIDTH = 24, 512
STACK = nnx.state(nnx.eval_shape(lambda: stack(lambda rngs: Linear(WIDTH, WIDTH, rngs=rngs), LAYERS, nnx.Rngs(0))))
STACK_RULES = (Rule("kernel", "layers.{layer}.kernel", layout="linear"), Rule("bias", "layers.{layer}.bias"))


def write_stack(folder, dtype=np.float32) -> dict[str, np.ndarray]:
    rng, content = np.random.default_rng(0), {}
    for layer in range(LAYERS):
        content[f"layers.{layer}.kernel"] = rng.normal(size=(WIDTH, WIDTH)).astype(dtype)
        content[f"layers.{layer}.bias"] = rng.normal(size=WIDTH).astype(dtype)
    save_file(content, folder / "model.safetensors")
    return content


@pytest.mark.fault("memory-of-loading")
@pytest.mark.parametrize("sizes", [None, (1, 8, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_a_stack_is_put_together_on_the_devices(tmp_path, monkeypatch, sizes, stored):
    content = write_stack(tmp_path, stored)
    layer_bytes = WIDTH * WIDTH * 4
    monkeypatch.setattr(load, "BLOCK_BYTES", 2 * layer_bytes)
    monkeypatch.setattr(load, "CHUNK_BYTES", layer_bytes // 8)
    mesh = sizes and make_mesh(*sizes)
    given = {"dtype": "float32", "sharding_rules": ((r"kernel", P("fsdp", "tensor")),), "mesh": mesh}
    load.load_params(STACK, STACK_RULES, tmp_path, **given)  # traced and compiled
    tracemalloc.start()
    params = jax.block_until_ready(load.load_params(STACK, STACK_RULES, tmp_path, **given))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two layers, what a device takes of them, what the threads read, and small change: not the 24 of the stack.
    assert most < 8 * layer_bytes
    for layer in range(LAYERS):
        np.testing.assert_array_equal(params.kernel[...][layer], content[f"layers.{layer}.kernel"].T)
        np.testing.assert_array_equal(params.bias[...][layer], content[f"layers.{layer}.bias"])


@pytest.mark.fault("memory-of-loading")
@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_a_stack_is_quantised_block_by_block(tmp_path, monkeypatch, sizes):
    content = write_stack(tmp_path)
    layer_bytes = WIDTH * WIDTH * 4
    monkeypatch.setattr(load, "BLOCK_BYTES", 2 * layer_bytes)
    layers = nnx.eval_shape(lambda: stack(lambda rngs: Linear(WIDTH, WIDTH, rngs=rngs), LAYERS, nnx.Rngs(0)))
    quantize_linears(layers, "")
    rules = {"sharding_rules": ((r"kernel", P("fsdp", "tensor")),), "mesh": sizes and make_mesh(*sizes)}
    before, on_devices = sum(array.nbytes for array in jax.live_arrays()), []

    def watched(block):
        on_devices.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return quantized(block)

    monkeypatch.setattr(load, "quantized", watched)
    params = load.load_params(nnx.state(layers), STACK_RULES, tmp_path, dtype="bfloat16", **rules)
    # The stack, a quarter of what it was, and a block of two layers: not its 24 as they were.
    assert len(on_devices) == LAYERS // 2 and max(on_devices) < (LAYERS // 4 + 3) * layer_bytes
    for layer in range(LAYERS):
        kernel, scale = quantized(content[f"layers.{layer}.kernel"].T)
        np.testing.assert_array_equal(params.kernel[...][layer], kernel)
        np.testing.assert_array_equal(params.kernel_scale[...][layer], scale)


class OfOneProcess:
    """A sharding as one of two processes sees it: half of the devices are its own."""

    def __init__(self, sharding, process: int):
        self.sharding, self.process = sharding, process

    def addressable_devices_indices_map(self, shape):
        everything = self.sharding.devices_indices_map(shape)
        own = jax.devices()[4 * self.process : 4 * self.process + 4]
        return {device: everything[device] for device in own}


@pytest.mark.fault("memory-of-loading")
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("layout", ["same", "linear"])
def test_a_process_reads_the_rows_that_its_devices_hold_and_keeps_its_columns(tmp_path, monkeypatch, process, layout):
    rows, columns = 32, 24
    content = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    save_file({"w": content}, tmp_path / "model.safetensors")
    monkeypatch.setattr(load, "CHUNK_BYTES", 3 * columns * 4)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays: arrays)
    read, made = [], []
    real, empty = files.WeightFiles.read, np.empty
    monkeypatch.setattr(
        files.WeightFiles, "read", lambda self, name, *ends: read.extend(range(*ends)) or real(self, name, *ends)
    )

    def noted(shape, dtype):
        made.append(empty(shape, dtype))
        return made[-1]

    monkeypatch.setattr(load.np, "empty", noted)
    whole = content if layout == "same" else content.T
    for cut in (0, 1):
        mesh = make_mesh(data=1, fsdp=2, tensor=4)  # process 0 has the first half along fsdp
        spec = P("fsdp", "tensor") if cut == 0 else P("tensor", "fsdp")
        sharding = OfOneProcess(NamedSharding(mesh, spec), process)
        read.clear(), made.clear()
        with files.WeightFiles(tmp_path) as opened, ThreadPoolExecutor(2) as pool:
            reader = load._Reader(opened, np.dtype(np.float32), pool)
            arrays = reader.leaf(whole.shape, [Tensor("w", None, "w", content.shape, layout)], sharding)
        for device, index in sharding.addressable_devices_indices_map(whole.shape).items():
            [array] = [array for array in arrays if array.device == device]
            np.testing.assert_array_equal(array, whole[index])
        half = list(whole.shape)
        half[cut] //= 2
        shapes = [array.shape for array in made]
        assert tuple(half) in shapes and whole.shape not in shapes
        halves_rows = (cut == 0) == (layout == "same")
        own = range(process * rows // 2, (process + 1) * rows // 2) if halves_rows else range(rows)
        assert sorted(read) == list(own)


# Files that are damaged


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a tiny pipeline, and a copy of it to damage."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_generator(t5=False, num_layers=1, dual_attention_layers=()).save_pretrained(folder)
    return folder


NAME = "diffusion_pytorch_model"


@pytest.fixture
def transformer(pipeline, tmp_path):
    """The transformer of a copy of the pipeline, in two shards."""
    shutil.copytree(pipeline, tmp_path / "pipeline")
    folder = tmp_path / "pipeline" / "transformer"
    content = load_file(folder / f"{NAME}.safetensors")
    (folder / f"{NAME}.safetensors").unlink()
    names, weight_map = sorted(content), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{NAME}-{number:05d}-of-00002.safetensors"
        save_file({name: content[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def second_shard(folder) -> tuple[Path, str]:
    """The file, and the name of the tensor that lies last in it."""
    file = folder / f"{NAME}-00002-of-00002.safetensors"
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    header.pop("__metadata__", None)
    return file, max(header, key=lambda name: header[name]["data_offsets"][1])


def told(folder) -> str:
    with pytest.raises(WeightsError) as error:
        Generator.from_pretrained(folder.parent, dtype="float32")
    return str(error.value)


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:7],
        lambda content: content[:200],
        lambda content: (1 << 40).to_bytes(8, "little") + content[8:],  # a header beyond every limit
        lambda content: (60 << 20).to_bytes(8, "little") + content[8:],  # a header longer than its file
        lambda content: content[:8] + b"}" + content[9:],
        lambda content: content.replace(b'"data_offsets"', b'"data_offsetz"', 1),
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
        lambda content: b"\x80\x04" + os.urandom(500),
        lambda content: b"<!DOCTYPE html><html>Sign in</html>",
    ],
)
def test_a_header_that_is_damaged_is_told_with_what_should_be_in_it(transformer, damage):
    file, _ = second_shard(transformer)
    index = json.loads((transformer / f"{NAME}.safetensors.index.json").read_text())["weight_map"]
    file.write_bytes(damage(file.read_bytes()))
    first = next(name for name, where in index.items() if where == file.name)
    message = told(transformer)
    assert str(file) in message and f"should hold {first}" in message and "fetch the file again" in message


@pytest.mark.fault("damaged-weights")
def test_a_file_that_is_cut_short_is_told_with_the_tensor_that_is_lost(transformer):
    file, last = second_shard(transformer)
    file.write_bytes(file.read_bytes()[:-1])
    message = told(transformer)
    assert str(file) in message and f"cut short and lacks {last}: fetch the file again" in message


@pytest.mark.fault("damaged-weights")
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(transformer, monkeypatch):
    # A file mapped into memory would end the process with SIGBUS here.
    file, last = second_shard(transformer)
    real = load._check

    def cut_after_the_check(*args):
        real(*args)
        os.truncate(file, file.stat().st_size - 1)

    monkeypatch.setattr(load, "_check", cut_after_the_check)
    assert re.search(rf"{file.name}, tensor {re.escape(last)} ends early.*fetch the file again", told(transformer))


@pytest.mark.fault("damaged-weights")
def test_a_failing_disk_is_told_with_file_and_tensor(transformer, monkeypatch):
    file, last = second_shard(transformer)
    beyond, real = file.stat().st_size - 8, os.preadv

    def fails_at_the_end(descriptor, buffers, offset):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(file) and offset + len(buffers[0]) > beyond:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(files.os, "preadv", fails_at_the_end)
    message = told(transformer)
    assert f"{file}, tensor {last} cannot be read (Input/output error); check the storage" in message


@pytest.mark.fault("damaged-weights")
def test_reads_that_return_less_than_asked_for_are_continued(transformer, monkeypatch):
    real = os.preadv
    expected = Generator.from_pretrained(transformer.parent, dtype="float32").params
    monkeypatch.setattr(files.os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:5000]], offset))
    got = Generator.from_pretrained(transformer.parent, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(got), nnx.to_pure_dict(expected))


@pytest.mark.fault("damaged-weights")
def test_a_file_that_may_not_be_read_is_named(transformer, monkeypatch):
    file, _ = second_shard(transformer)
    real = files.safe_open

    def refused(path, **given):
        if path == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, **given)

    monkeypatch.setattr(files, "safe_open", refused)
    assert re.search(rf"{file}, which should hold .*Permission denied.*check its permissions", told(transformer))


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize("name", [f"{NAME}.safetensors.index.json", "config.json"])
def test_a_json_file_that_cannot_be_read_is_named(transformer, name):
    (transformer / name).unlink()
    (transformer / name).mkdir()
    assert re.search(rf"{transformer / name} cannot be read \(Is a directory\)", told(transformer))


@pytest.mark.fault("damaged-weights")
@pytest.mark.parametrize("value, dtype", [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e5, "float16")])
def test_numbers_that_are_not_finite_are_told_with_file_and_tensor(transformer, value, dtype):
    file, last = second_shard(transformer)
    content = load_file(file)
    content[last] = content[last].copy()
    content[last].reshape(-1)[-1] = value
    save_file(content, file)
    with pytest.raises(WeightsError, match=rf"{file.name}, tensor {re.escape(last)} holds NaN, infinity.*{dtype}"):
        Generator.from_pretrained(transformer.parent, dtype=dtype)


@pytest.mark.fault("damaged-weights")
def test_a_critic_s_damaged_weights_are_told_alike(tmp_path):
    folder = tmp_path / "critic"
    shutil.copytree(embedded_path("embedded:critic_gen"), folder)
    [file] = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=rf"{file.name} cannot be read .*cut short and lacks \S+: fetch"):
        Critic.from_pretrained(folder, dtype="float32")
