"""How much host memory, and how long, it takes to load a large checkpoint onto eight devices.

    python -m benchmarks.loading --gigabytes 4 --mesh fsdp=8 --mesh data=2,fsdp=2,tensor=2

Writes a Qwen3-VL checkpoint with the widths of the 8B and as many layers as fill the size, in shards, and loads it in
a fresh process for every mesh, by the path that training and serving take. Two measures of the memory that it takes
besides the arrays on the devices, which are simulated and so lie in the host's memory too: the peak of RssAnon (sampled
every 5 milliseconds) less what it was before and less the arrays; and the most that Python and numpy held at any time
(tracemalloc), which sees a buffer also while few of the arrays are there. Exits with 1 when one of them is above 1.5
times the largest tensor and an allowance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from firm_jax import models
from firm_jax.interop.mapping import SAME_NAMES, Tensor, tensors

DEVICES = 8
SHARD_BYTES = 1_000_000_000
DTYPES = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float32": ("F32", np.float32)}


def checkpoint_config(layers: int, width: int, vocabulary: int) -> dict:
    """config.json of a Qwen3-VL with the proportions of the 8B (there width is 4096) and a small vision tower."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            "head_dim": 128,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "max_position_embeddings": 4096,
            "num_attention_heads": width // 128,
            "num_hidden_layers": layers,
            "num_key_value_heads": width // 512,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "vocab_size": vocabulary,
        },
        "vision_config": {
            "deepstack_visual_indexes": [0],
            "depth": 2,
            "hidden_size": 256,
            "in_channels": 3,
            "intermediate_size": 512,
            "num_heads": 4,
            "num_position_embeddings": 256,
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def checkpoint_tensors(config: dict) -> list[Tensor]:
    network = models.network_class(config["architectures"][0])
    typed = network.config_class.from_hf(config)
    return list(tensors(models.abstract(network, typed), (*network.weight_rules(typed), *SAME_NAMES)))


def write_checkpoint(folder: Path, gigabytes: float, width: int, vocabulary: int, stored: str) -> None:
    """Write config.json, shards and index, one tensor in memory at a time."""
    code, dtype = DTYPES[stored]
    size = np.dtype(dtype).itemsize

    def total(layers: int) -> int:
        return sum(
            size * int(np.prod(t.shape)) for t in checkpoint_tensors(checkpoint_config(layers, width, vocabulary))
        )

    one_layer = total(3) - total(2)
    layers = max(2, round((gigabytes * 1e9 - total(2)) / one_layer) + 2)
    config = checkpoint_config(layers, width, vocabulary)
    weight_map: dict[str, str] = {}
    shards = list(_shards(checkpoint_tensors(config), size))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for tensor in shard:
            end = offset + size * int(np.prod(tensor.shape))
            header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in shard:
                file.write(content(tensor.name, tensor.shape).astype(dtype, copy=False).view(np.uint8))
        weight_map |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def content(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of one tensor, bfloat16 [...]: small ones that differ from tensor to tensor."""
    bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0x3C00, 0x3E00, shape, np.uint16)
    return bits.view(ml_dtypes.bfloat16)


def _shards(wanted: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    shard, room = [], SHARD_BYTES
    for tensor in wanted:
        needed = size * int(np.prod(tensor.shape))
        if shard and needed > room:
            yield shard
            shard, room = [], SHARD_BYTES
        shard.append(tensor)
        room -= needed
    yield shard


def load(folder: Path, mesh_sizes: dict[str, int], dtype: str, trace: bool) -> dict[str, float]:
    """Load in this process, and say what it took: bytes and seconds. Checks two tensors against their content.

    trace: count what Python and numpy hold, which takes several times as long.
    """
    import jax

    from firm_jax.mesh import make_mesh

    mesh = make_mesh(**({"data": 1} | mesh_sizes))
    jax.block_until_ready(jax.device_put(np.zeros(1), NamedSharding(mesh, PartitionSpec())))
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins here
    before = memory()
    if trace:
        tracemalloc.start()
    with Sampler() as sampler:
        start, start_cpu = time.perf_counter(), time.process_time()
        model = models.from_pretrained(folder, dtype=dtype, mesh=mesh)
        arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    buffers = tracemalloc.get_traced_memory()[1]  # 0 when not tracing
    tracemalloc.stop()
    on_devices = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    high_water = memory()["VmHWM"]
    kernel = model.language_model.layers.mlp.gate_proj.kernel[...]
    for layer in (0, len(kernel) - 1):
        name = f"model.language_model.layers.{layer}.mlp.gate_proj.weight"
        expected = content(name, kernel.shape[:0:-1]).T.astype(kernel.dtype)
        if not np.array_equal(np.asarray(kernel[layer]), expected):
            raise SystemExit(f"{name} was not loaded as it was written")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "arrays": on_devices,
        "beyond": sampler.most["RssAnon"] - before["RssAnon"] - on_devices,
        "buffers": buffers,
        "file_pages": sampler.most["RssFile"] - before["RssFile"],
        "high_water": high_water - before["VmRSS"] - on_devices,
    }


class Sampler:
    """The most memory of a kind that the process held while this was entered: `most`, by the kernel's names."""

    def __init__(self):
        self.most, self._done = memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            now = memory()
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()


def memory() -> dict[str, int]:
    """The process's memory by the kernel's names, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def parse_mesh(text: str) -> dict[str, int]:
    return {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint")
    parser.add_argument("--mesh", action="append", help=f"axes of {DEVICES} devices, as data=2,fsdp=4; may be repeated")
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16", help="dtype in the files")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the arrays")
    parser.add_argument("--width", type=int, default=4096, help="of the language model, a multiple of 512")
    parser.add_argument("--vocabulary", type=int, default=16384, help="the released models have 151936")
    parser.add_argument("--allowance", type=float, default=500, help="megabytes beside 1.5 times the largest tensor")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; a temporary folder by default")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load, parse_mesh(given.mesh[0]), given.dtype, given.trace)))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        start = time.perf_counter()
        write_checkpoint(Path(folder), given.gigabytes, given.width, given.vocabulary, given.stored)
        config = json.loads((Path(folder) / "config.json").read_text())
        wanted = checkpoint_tensors(config)
        size = np.dtype(DTYPES[given.stored][1]).itemsize
        sizes = {tensor.name: size * int(np.prod(tensor.shape)) for tensor in wanted}
        largest = max(sizes, key=sizes.get)
        bound = 1.5 * sizes[largest] + given.allowance * 1e6
        print(
            f"{sum(sizes.values()) / 1e9:.2f} GB in {len(list(Path(folder).glob('*.safetensors')))} files, written in "
            f"{time.perf_counter() - start:.0f} s; largest tensor {sizes[largest] / 1e6:.0f} MB ({largest}); "
            f"bound {bound / 1e6:.0f} MB"
        )
        held = True
        for mesh in given.mesh or ["fsdp=8"]:
            command = "--load", folder, "--mesh", mesh, "--dtype", given.dtype
            taken = in_a_fresh_process(*command)
            buffers = in_a_fresh_process(*command, "--trace")["buffers"]
            held &= max(taken["beyond"], buffers) < bound
            gigabytes = sum(sizes.values()) / 1e9
            print(
                f"{mesh}: {taken['seconds']:.1f} s ({taken['cpu_seconds']:.1f} s of CPU), "
                f"{gigabytes / taken['seconds']:.2f} GB/s; arrays {taken['arrays'] / 1e9:.2f} GB, beyond them "
                f"{taken['beyond'] / 1e6:.0f} MB at the peak; buffers {buffers / 1e6:.0f} MB at any time "
                f"(mapped files {taken['file_pages'] / 1e6:.0f} MB, VmHWM beyond the arrays "
                f"{taken['high_water'] / 1e6:.0f} MB)",
                flush=True,
            )
    return 0 if held else 1


def in_a_fresh_process(*arguments: str) -> dict[str, float]:
    """What `load` says in a process with eight simulated devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
