"""The same run on any mesh, and arrays that lie on it as the rules say.

By default one device, `fsdp` alone, as is usual, and all three axes together; `pytest -m slow` takes every
other shape of mesh.
"""

import itertools
import math
import re

import jax
import mesh_job
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from firm_jax.models.lora import lora_shardings
from firm_jax.models.qwen3_vl import Qwen3VL
from firm_jax.sharding import path_name, shardings

# Read back here without saying where the arrays should lie.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

# (data, fsdp, tensor)
QUICK = [(1, 1, 1), (1, 4, 1), (2, 2, 2)]
ALL = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) <= 8]
MESHES = [pytest.param(sizes, marks=() if sizes in QUICK else pytest.mark.slow) for sizes in ALL]

BATCH = ("data", "fsdp")
COLUMNS = ("tensor", "fsdp")
# One parameter of every kind: FSDP cuts a kernel's input, unless that is what the tensor axis cuts. Where a model
# writes tokens, it cuts the output of what is wide there: see SHARDING_RULES in models/qwen_text.py.
GENERATOR = {
    "blocks.attn.to_q.kernel": (None, "fsdp", "tensor"),
    "blocks.attn.add_v_proj.kernel": (None, "fsdp", "tensor"),
    "blocks.attn.to_out.0.kernel": (None, "tensor", "fsdp"),
    "blocks.ff.net.0.proj.kernel": (None, "fsdp", "tensor"),
    "blocks.ff_context.net.2.kernel": (None, "tensor", "fsdp"),
    "blocks.norm1.linear.kernel": (None, "fsdp", None),
    "blocks.attn.to_q.bias": (),
    "last_block.attn.to_out.0.kernel": ("tensor", "fsdp"),
    "context_embedder.kernel": ("fsdp", None),
    "proj_out.kernel": ("fsdp", None),
    "pos_embed.pos_embed": (),
}
CRITIC = {
    "language_model.embed_tokens.embedding": ("tensor", "fsdp"),
    "language_model.layers.self_attn.q_proj.kernel": (None, None, COLUMNS),
    "language_model.layers.self_attn.o_proj.kernel": (None, "tensor", "fsdp"),
    "language_model.layers.mlp.up_proj.kernel": (None, None, COLUMNS),
    "language_model.layers.mlp.down_proj.kernel": (None, "tensor", "fsdp"),
    "language_model.norm.scale": (),
    "visual.blocks.attn.qkv.kernel": (None, "fsdp", None),
    "visual.blocks.mlp.linear_fc1.kernel": (None, "fsdp", "tensor"),
    "visual.merger.linear_fc2.kernel": ("tensor", "fsdp"),
    "visual.patch_embed.kernel": ("fsdp", None),
}
ADAPTERS = {  # a is cut as its kernel's input, b as its output; the rank stays whole
    "blocks.attn.to_q.a": (None, "fsdp", None),
    "blocks.attn.to_q.b": (None, None, "tensor"),
    "blocks.attn.to_out.0.a": (None, "tensor", None),
    "last_block.attn.to_out.0.b": (None, "fsdp"),
}
# What a device may hold with its FSDP cut undone: for one matmul over many rows, one kernel of these at a time. The
# kernels that stand alone among them are whole then: 84 MB for SD3.5-medium in bfloat16, and for the 8B critic.
GATHERED = re.compile(
    r"blocks\.(attn|ff|ff_context|mlp)\.|layers\.(self_attn|mlp)\.|last_block\.(attn|ff)\.|context_embedder|"
    r"pos_embed\.proj|proj_out|patch_embed|merger"
)
# Which parameters a program is given; every other program of the job may hold none.
GIVEN = {"draw": "generator", "update": "generator", "encode_images": "visual"} | dict.fromkeys(
    ("embed", "read_prefixes", "prefill", "decode_chunk"), "language_model"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of the models; compiling is what takes time here, so the machine code is left as it comes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield mesh_job.write_world(tmp_path_factory.mktemp("world"))
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one_device(world):
    return mesh_job.run(world, world / "one_device", (1, 1, 1))


@pytest.fixture(scope="module", params=MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def ran(world, one_device, request):
    if request.param == (1, 1, 1):
        yield one_device
    else:
        yield mesh_job.run(world, world / "x".join(map(str, request.param)), request.param)
        jax.clear_caches()  # the programs of many meshes would fill the memory


@pytest.mark.fault("other-mesh")
def test_the_run_is_the_same(ran, one_device):
    """All is float32, and only the order of sums differs between meshes: 1e-7 an operation.

    Pictures stay within 1e-5 of [0, 1], losses and gradient norms within 1e-5 of themselves, and within 1e-4 what
    compares two policies, whose velocities agree in their first digits. Rewards are equal, because the critic writes
    the same tokens. AdamW divides a gradient by its size, so that the few that are hardly more than rounding move by
    something else: after four steps of up to 3e-3 no number is off by a tenth of one, and the root mean square of
    each array's differences is below 1e-5.
    """
    assert len(ran.images) == 2
    np.testing.assert_allclose(ran.images, one_device.images, rtol=0, atol=1e-5)
    pairs = zip(ran.lines("judgements.jsonl"), one_device.lines("judgements.jsonl"), strict=True)
    for ours, expected in pairs:
        ours.pop("file", None), expected.pop("file", None)  # which are kept hangs on the last digits
        assert ours.pop("expected") == pytest.approx(expected.pop("expected"), abs=1e-3)
        assert ours == expected
    for ours, expected in zip(ran.lines("metrics.jsonl"), one_device.lines("metrics.jsonl"), strict=True):
        for name, wanted in expected.items():
            if name.startswith(("time", "throughput", "goodput")):
                continue
            rel = 1e-4 if name.startswith("policy/") else 1e-5
            wanted = wanted if wanted is None else pytest.approx(wanted, rel=rel, abs=1e-7)
            assert ours[name] == wanted, name
    state, expected = ran.last_state(), one_device.last_state()
    assert state.keys() == expected.keys() and state["step"] == 4
    for name, array in state.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=3e-4, err_msg=name)
        assert np.sqrt(np.square(array - expected[name]).mean()) < 1e-5, name


def test_the_run_is_not_trivially_the_same(one_device):
    first, second = one_device.images
    assert not np.allclose(first, second, atol=0.1) and min(image.std() for image in first) > 0.01
    rewards = [record["reward"] for record in one_device.lines("judgements.jsonl")]
    assert len(set(rewards)) >= 4
    state = one_device.last_state()
    moved = {name.split("/")[0] for name, array in state.items() if name.endswith("/b") and np.abs(array).max() > 1e-3}
    assert {"lora", "old", "ema"} <= moved


@pytest.mark.fault("other-mesh")
def test_parameters_are_sharded_as_the_rules_say(ran):
    generator, critic = ran.job.generator, ran.job.critic.decoder
    for params, rules, literal in (
        (generator.params, generator.sharding_rules, GENERATOR),
        (critic.params, Qwen3VL.sharding_rules, CRITIC),
    ):
        assert_laid_out(params, shardings(params, rules, ran.mesh))
        assert_literally(params, literal)
    for replicated in (generator.vae_params, generator.text_encoders.params):
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(replicated))


@pytest.mark.fault("other-mesh")
def test_adapters_gradients_and_optimizer_state_are_sharded_as_their_kernels(ran):
    state = ran.state
    [moments] = [part for part in jax.tree.leaves(state["optimizer"], is_leaf=has_moments) if has_moments(part)]
    expected = lora_shardings(state["lora"], ran.job.generator.sharding_rules, ran.mesh)
    for tree in (state["lora"], state["old"], state["ema"], moments.mu, moments.nu):
        assert_laid_out(tree, expected)
        assert_literally(tree, ADAPTERS)
    specs = {
        path_name(path): sharding.spec for path, sharding in jax.tree_util.tree_flatten_with_path(ran.gradients)[0]
    }
    wanted = {path_name(path): sharding.spec for path, sharding in jax.tree_util.tree_flatten_with_path(expected)[0]}
    assert {name: full(spec) for name, spec in specs.items()} == {name: full(spec) for name, spec in wanted.items()}


@pytest.mark.fault("other-mesh")
def test_the_critic_s_cache_is_sharded_over_the_batch_and_the_heads(ran):
    sizes = ran.mesh.shape
    cut = "tensor" if mesh_job.TEXT["num_key_value_heads"] % sizes["tensor"] == 0 else None
    assert ran.caches
    for cache in ran.caches:
        for name in ("k", "v"):
            layers, batch, heads, slots, width = cache[name].shape
            assert layers == mesh_job.TEXT["num_hidden_layers"] and heads == mesh_job.TEXT["num_key_value_heads"]
            assert full(cache[name].sharding.spec) == full((None, BATCH, cut))
            rows = batch // (sizes["data"] * sizes["fsdp"])
            on_one = (layers, rows, heads // (sizes["tensor"] if cut else 1), slots, width)
            assert {shard.data.shape for shard in cache[name].addressable_shards} == {on_one}


@pytest.mark.fault("memory-of-devices")
def test_no_program_gathers_a_stack_or_more_of_the_weights_than_it_has_to(ran):
    """Read off the arrays of every program that the job has compiled, by their shapes.

    Nothing holds two layers of a stack with their FSDP cut undone; one layer, or one kernel of those that stand
    alone, only as GATHERED says; and the program that writes the critic's answers holds no such kernel at all.
    """
    if ran.mesh.shape["fsdp"] == 1:
        pytest.skip("nothing is cut by FSDP")
    kernels = cut_kernels(ran)
    assert set(GIVEN) <= {name for name, _ in ran.programs}
    found = set()
    for name, arrays in ran.programs:
        own = GIVEN.get(name)
        for array in arrays:
            for kernel, shape in kernels.items():
                if own and not kernel.startswith(own):
                    continue
                rest = without(array, shape)
                assert not rest, f"{name}: {array} holds {kernel} {shape} more than once"
                if rest == []:
                    found.add((name, shape))
    allowed = {kernels[kernel] for kernel in kernels if GATHERED.search(kernel)}
    for name, shape in found:
        assert name in GIVEN and name != "decode_chunk" and shape in allowed, (name, shape)
    # The same look finds what is gathered by design.
    assert {(name, kernels["generator.blocks.ff.net.0.proj.kernel"]) for name in ("draw", "update")} <= found
    assert ("prefill", kernels["language_model.layers.mlp.up_proj.kernel"]) in found


def cut_kernels(ran) -> dict[str, tuple[int, ...]]:
    """Every parameter that FSDP cuts -> the sorted shape of one layer of it as it would be with that cut undone."""
    kernels = {}
    for owner, params in (("generator.", ran.job.generator.params), ("", ran.job.critic.decoder.params)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            spec = [axes if isinstance(axes, tuple) else (axes,) for axes in leaf.sharding.spec]
            if any("fsdp" in axes for axes in spec):
                last_two = list(zip(leaf.shape, spec, strict=True))[-2:]
                tensor = ran.mesh.shape["tensor"]
                undone = (size // tensor if "tensor" in axes else size for size, axes in last_two)
                kernels[owner + path_name(path)] = tuple(sorted(undone))
    return kernels


def without(array: tuple[int, ...], shape: tuple[int, ...]) -> list[int] | None:
    """The dimensions of `array` besides those of `shape`; None when it lacks one of them."""
    rest = list(array)
    for size in shape:
        if size not in rest:
            return None
        rest.remove(size)
    return rest


def has_moments(part) -> bool:
    return hasattr(part, "mu")


def full(spec) -> tuple:
    """A spec without the dimensions at its end that are whole."""
    spec = tuple(spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def assert_laid_out(tree, expected):
    def one(path, leaf, sharding: NamedSharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (path_name(path), leaf.sharding, sharding)

    jax.tree_util.tree_map_with_path(one, tree, expected)


def assert_literally(tree, specs: dict[str, tuple]):
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for name, spec in specs.items():
        leaf = leaves[name]
        expected = NamedSharding(leaf.sharding.mesh, P(*spec))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding.spec)
