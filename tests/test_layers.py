"""The layers against their definitions, stacks against loops, and what each keeps of a batch's sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from firm_jax.mesh import make_mesh, shard_batch
from firm_jax.models.layers import (
    REMAT_POLICIES,
    Conv,
    Embedding,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    activate,
    gelu,
    output_sharding,
    project,
    repeat_batch,
    reshape,
    rotate,
    scan_layers,
    split_heads,
    stack,
    take_rows,
    zeros_beside,
)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def randomised(module: nnx.Module) -> nnx.Module:
    """The module with no parameter at a value that would hide it."""
    graphdef, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    return nnx.merge(
        graphdef, jax.tree.unflatten(tree, [jnp.asarray(normal(*x.shape, seed=i)) for i, x in enumerate(leaves)])
    )


def in_dtype(module: nnx.Module, dtype) -> nnx.Module:
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


# Values


def test_linear_and_embedding():
    linear, embedding = randomised(Linear(5, 3, rngs=nnx.Rngs(0))), randomised(Embedding(7, 4, rngs=nnx.Rngs(0)))
    x, ids = normal(2, 3, 5), np.array([[6, 0], [3, 3]])
    np.testing.assert_allclose(linear(x), x @ linear.kernel[...] + linear.bias[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embedding(ids), np.asarray(embedding.embedding[...])[ids])
    hidden = normal(2, 4)
    np.testing.assert_allclose(embedding.attend(hidden), hidden @ embedding.embedding[...].T, rtol=1e-5, atol=1e-6)
    assert embedding.attend(jnp.asarray(hidden, jnp.bfloat16), jnp.float32).dtype == jnp.float32


def test_norms():
    x = 3 + 2 * normal(2, 3, 5, 8)
    layer, rms, group = (randomised(m) for m in (LayerNorm(8), RMSNorm(8), GroupNorm(4, 8, epsilon=1e-4)))

    def scaled(y, norm):
        return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    np.testing.assert_allclose(layer(x), scaled((x - mean) / np.sqrt(variance + 1e-6), layer), rtol=1e-4, atol=1e-5)
    plain = LayerNorm(8, affine=False)
    np.testing.assert_allclose(plain(x), (x - mean) / np.sqrt(variance + 1e-6), rtol=1e-4, atol=1e-5)
    square = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms(x), x / square * np.asarray(rms.scale[...]), rtol=1e-4, atol=1e-5)
    grouped = x.reshape(2, 3, 5, 4, 2)
    mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    expected = scaled(((grouped - mean) / np.sqrt(variance + 1e-4)).reshape(x.shape), group)
    np.testing.assert_allclose(group(x), expected, rtol=1e-4, atol=1e-5)
    assert all(norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16 for norm in (plain, rms))


@pytest.mark.parametrize("stride, padding, size", [(1, 1, (4, 5)), (2, ((0, 1), (0, 1)), (2, 2)), (1, None, (2, 3))])
def test_convolution(stride, padding, size):
    conv = randomised(Conv(2, 3, 3, stride=stride, padding=padding, rngs=nnx.Rngs(0)))
    x, kernel = normal(1, 4, 5, 2), np.asarray(conv.kernel[...])
    sides = padding if isinstance(padding, tuple) else ((padding or 0,) * 2,) * 2
    padded = np.pad(x, ((0, 0), *sides, (0, 0)))
    got = np.asarray(conv(x))
    assert got.shape == (1, *size, 3)
    for i, j in np.ndindex(*size):
        window = padded[0, i * stride : i * stride + 3, j * stride : j * stride + 3]
        expected = np.einsum("hwi,hwio->o", window, kernel) + conv.bias[...]
        np.testing.assert_allclose(got[0, i, j], expected, rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs_and_keeps_lengths():
    x, angle = normal(1, 2, 1, 6), normal(1, 2, 3)
    turned = np.asarray(rotate(jnp.asarray(x), jnp.cos(angle), jnp.sin(angle)))
    pairs = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[:, :, None]
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag], -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [jax.nn.gelu, gelu, jax.nn.silu])
def test_an_activation_is_rounded_once_and_keeps_its_input_alone(function):
    x = jnp.asarray(4 * normal(500), jnp.bfloat16)
    y, pull = jax.vjp(lambda x: activate(function, x), x)
    exact, exact_pull = jax.vjp(function, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(pull(y)[0], exact_pull(y.astype(jnp.float32))[0].astype(jnp.bfloat16))
    assert np.any(np.asarray(function(x) != y))  # it does make a difference
    assert [(kept.shape, kept.dtype) for kept in jax.tree.leaves(pull)] == [((500,), jnp.bfloat16)]


# Stacks of layers


class Residual(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = Linear(4, 4, rngs=rngs)

    def __call__(self, x, shift):
        return x + jnp.tanh(self.linear(x)) + shift


@pytest.mark.parametrize("remat", [None, *REMAT_POLICIES])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_scan_is_a_loop_over_its_layers(remat, dtype, tolerance):
    stacked = in_dtype(stack(lambda rngs: Residual(rngs=rngs), 3, nnx.Rngs(0)), dtype)
    graphdef, params = nnx.split(stacked)
    kernel = np.asarray(stacked.linear.kernel[...])
    assert kernel.shape == (3, 4, 4) and np.abs(kernel[0] - kernel[1]).max() > 0.1
    x, shifts = jnp.asarray(normal(2, 4), dtype), jnp.asarray(normal(3, 1, 4), dtype)

    def body(layer, carry, shift):
        carry = layer(carry, shift)
        return carry, carry.sum()

    def scanned(params):
        last, sums = scan_layers(nnx.merge(graphdef, params), body, x, shifts, remat=remat)
        return (last**2).sum() + sums.sum(), (last, sums)

    def looped(params):
        carry, sums = x, []
        for index in range(3):
            layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], params))
            carry, total = body(layer, carry, shifts[index])
            sums.append(total)
        return (carry**2).sum() + sum(sums), (carry, jnp.stack(sums))

    got, expected = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (scanned, looped))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), rtol=tolerance, atol=tolerance)


def test_on_a_cpu_bfloat16_is_not_converted_to_be_sliced():
    """Neither a stack whose layers are run, nor a table whose rows are taken; nor for their gradients' sake."""
    stacked = in_dtype(stack(lambda rngs: Residual(rngs=rngs), 5, nnx.Rngs(0)), "bfloat16")
    table = in_dtype(Embedding(11, 4, rngs=nnx.Rngs(0)), "bfloat16")
    graphdef, params = nnx.split((table, stacked))
    ids = jnp.array([[1, 7], [1, 1]])

    def run(params):
        table, stacked = nnx.merge(graphdef, params)
        return scan_layers(stacked, lambda layer, x, _: (layer(x, 0), None), table(ids))[0].sum()

    whole = re.compile(r"f32\[(5,4,4|11,4)\]")
    assert not whole.search(jax.jit(run).lower(params).compile().as_text())
    gradients = jax.jit(jax.grad(run))(params)
    assert all(np.abs(leaf.astype(jnp.float32)).max() > 0 for leaf in jax.tree.leaves(gradients))
    rows = np.abs(np.asarray(gradients[0]["embedding"][...], np.float32)).max(1)
    assert set(np.flatnonzero(rows)) == {1, 7} and rows[1] > 1.5 * rows[7]  # taken three times


@pytest.mark.parametrize("remat, loops", [(None, True), ("none", False), ("full", True)])
def test_on_a_cpu_layers_stand_alone_where_a_backward_pass_is_kept_all_of(remat, loops):
    graphdef, params = nnx.split(stack(lambda rngs: Residual(rngs=rngs), 3, nnx.Rngs(0)))

    def run(params):
        stacked, x = nnx.merge(graphdef, params), jnp.ones((2, 4))
        return scan_layers(stacked, lambda layer, x, _: (layer(x, 0), None), x, remat=remat)[0].sum()

    assert (" while(" in jax.jit(jax.grad(run)).lower(params).compile().as_text()) == loops


@pytest.mark.parametrize("width", [4, 64])
def test_on_a_cpu_a_gradient_never_turns_its_cotangent(width):
    x, kernel = (jnp.asarray(normal(*shape)) for shape in ((96, 32), (32, width)))

    def gradient(x, kernel):
        return jax.grad(lambda kernel: jnp.square(project(x, kernel)).sum())(kernel)

    operands = r"dot_general .* : \(tensor<96x(\d+)xf32>, tensor<96x(\d+)xf32>\)"
    assert re.findall(operands, jax.jit(gradient).lower(x, kernel).as_text()) == [("32", str(width))]
    np.testing.assert_allclose(jax.jit(gradient)(x, kernel), 2 * x.T @ (x @ kernel), rtol=1e-4, atol=1e-3)


# Sharding


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def place(array, mesh, *spec):
    return jax.device_put(array, jax.NamedSharding(mesh, P(*spec)))


BATCH = ("data", "fsdp")


def test_without_a_mesh_nothing_is_stated():
    assert output_sharding(jnp.zeros((2, 3)), 1) is None


@pytest.mark.parametrize(
    "kernel_spec, out", [(("fsdp", "tensor"), "tensor"), (("tensor", "fsdp"), None), ((None, None), None)]
)
def test_a_projection_keeps_the_batch_and_takes_the_kernel_s_columns(mesh, kernel_spec, out):
    x, kernel = normal(8, 3, 4), normal(4, 6)
    with jax.set_mesh(mesh):
        got = jax.jit(project)(shard_batch(x, mesh), place(kernel, mesh, *kernel_spec))
    assert tuple(got.sharding.spec) == (BATCH, None, out)
    np.testing.assert_allclose(got, x @ kernel, rtol=1e-5, atol=1e-5)


MESHES = [(1, 8, 1), (2, 2, 2), (1, 4, 2)]
KERNEL_SPECS = [P("fsdp", "tensor"), P("tensor", "fsdp"), P("fsdp", None), P(None, ("tensor", "fsdp"))]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("spec", KERNEL_SPECS)
@pytest.mark.parametrize("rows", [8, 64])
def test_few_rows_go_to_where_the_weights_lie_and_many_stay(sizes, spec, rows):
    mesh = make_mesh(*sizes)
    x, kernel = normal(rows, 2, 32), normal(32, 48)
    with jax.set_mesh(mesh):
        split = place(kernel, mesh, *spec)
        on_devices = shard_batch(x, mesh)
        y = jax.jit(project)(on_devices, split)
        np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-4)
        wide = "tensor" if spec[1] in ("tensor", ("tensor", "fsdp")) else None
        assert jax.typeof(y).sharding.spec == P(("data", "fsdp"), None, wide)
        grads = jax.jit(jax.grad(lambda k, x: (project(x, k) ** 2).sum(), argnums=(0, 1)))(split, on_devices)
        program = jax.jit(project).lower(on_devices, split).compile().as_text()
    flat = x.reshape(-1, 32)
    np.testing.assert_allclose(grads[0], 2 * flat.T @ (flat @ kernel), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grads[1].reshape(flat.shape), 2 * flat @ kernel @ kernel.T, rtol=1e-3, atol=1e-3)
    assert grads[0].sharding.spec == spec
    over = [
        size // (mesh.shape["tensor"] if axis is not None and "tensor" in axis else 1)
        for axis, size in zip(spec, kernel.shape, strict=True)
    ]
    gathered = re.search(rf"= f32\[{over[0]},{over[1]}\]\S* (all-gather|all-reduce)", program)
    assert (gathered is not None) == (rows == 64)


@pytest.mark.parametrize("rows", [8, 64])
def test_bfloat16_is_summed_in_float32_in_both_directions(rows):
    mesh = make_mesh(2, 2, 2)
    x, kernel, toward = (
        jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((rows, 2, 32), (32, 48), (rows, 2, 48))
    )

    def pulled(x, kernel, toward):
        y, pull = jax.vjp(project, x, kernel)
        return y, *pull(toward)

    with jax.set_mesh(mesh):
        given = shard_batch(x, mesh), place(kernel, mesh, "fsdp", "tensor"), place(toward, mesh, BATCH, None, "tensor")
        lowered = jax.jit(pulled).lower(*given)
        got = lowered.compile()(*given)
    products = re.findall(r"stablehlo.dot_general .* : (.*)", lowered.as_text())
    assert len(products) == 3 and all("bf16" in line and line.endswith("f32>") for line in products)
    exact = jax.vjp(project, *(a.astype(jnp.float32) for a in (x, kernel)))
    expected = exact[0], *exact[1](toward.astype(jnp.float32))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=2**-7)  # partial sums are rounded too
    assert got[2].sharding.spec == P("fsdp", "tensor")


@pytest.mark.parametrize("sizes", MESHES)
def test_the_tied_head_is_never_gathered_for_a_few_rows(sizes):
    mesh, table, hidden = make_mesh(*sizes), normal(64, 32), normal(8, 32)
    graphdef, params = nnx.split(Embedding(64, 32, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda _: place(table, mesh, "tensor", "fsdp"), params)
        attend = jax.jit(lambda params, x: nnx.merge(graphdef, params).attend(x))
        x = shard_batch(hidden, mesh)
        np.testing.assert_allclose(attend(params, x), hidden @ table.T, rtol=1e-4, atol=1e-4)
        program = attend.lower(params, x).compile().as_text()
    assert not re.search(rf"= f32\[{64 // sizes[2]},32\]\S* all-gather", program)


@pytest.mark.parametrize(
    "spec, out", [((None, None), None), (("fsdp", "tensor"), "tensor"), (("tensor", "fsdp"), None)]
)
def test_rows_are_split_as_their_index_is(mesh, spec, out):
    table, index = normal(6, 4), np.array([0, 5, 3, 3, 1, 2, 4, 0], np.int32)
    with jax.set_mesh(mesh):
        got = jax.jit(take_rows)(place(table, mesh, *spec), shard_batch(index, mesh))
    assert tuple(got.sharding.spec) == (BATCH, out)
    np.testing.assert_array_equal(got, table[index])


@pytest.mark.parametrize("heads, shared, split", [(4, None, "tensor"), (3, None, None), (6, 3, None), (4, 2, "tensor")])
def test_heads_are_split_where_they_divide(mesh, heads, shared, split):
    x = normal(8, 3, 12)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: split_heads(x, heads, shared))(place(x, mesh, BATCH, None, "tensor"))
    assert tuple(got.sharding.spec) == (BATCH, None, split, None)
    np.testing.assert_array_equal(got, x.reshape(8, 3, heads, -1))


def test_shapes_change_behind_the_batch(mesh):
    x, row = normal(8, 6), normal(1, 2)
    with jax.set_mesh(mesh):
        shaped = jax.jit(lambda x: reshape(x, 8, 2, 3))(shard_batch(x, mesh))
        repeated = jax.jit(repeat_batch)(place(row, mesh), shard_batch(x, mesh))
        zeros = jax.jit(lambda x: zeros_beside(x, (8, 3, 4), jnp.bfloat16, BATCH, "tensor", None))(shard_batch(x, mesh))
    assert shaped.sharding.spec[0] == BATCH and repeated.sharding.spec[0] == BATCH
    np.testing.assert_array_equal(shaped, x.reshape(8, 2, 3))
    np.testing.assert_array_equal(repeated, np.repeat(row, 8, 0))
    assert zeros.dtype == jnp.bfloat16 and tuple(zeros.sharding.spec) == (BATCH, None, None)  # 3 does not divide
