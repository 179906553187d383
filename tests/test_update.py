"""The NFT update: one mean over samples and timesteps however it is cut up, and no step on numbers that are broken."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from firm_jax.data.groups import EpochGroups
from firm_jax.mesh import make_mesh, replicate, shard_batch
from firm_jax.rl.nft import nft_loss
from firm_jax.rl.update import init_state, make_optimizer, make_update, optimizer_batches

M, T, PROMPTS, LATENT, RANK, SCALE = 16, 3, 4, (2, 3, 4), 2, 1.5
SETTINGS = SimpleNamespace(
    learning_rate=0.01, b1=0.9, b2=0.999, eps=1e-3, weight_decay=0.1, max_grad_norm=0.05,
    beta=0.7, adv_clip=5.0, kl_weight=0.3, ema=0.9,
)  # fmt: skip
KEY = jax.random.key(5)


def velocity(params, lora, x, t, rows):
    """A network small enough to compile in no time: everything that the update passes on has an effect."""
    adapted = x @ params + (x @ lora["net"]["a"]) @ lora["net"]["b"]
    return jnp.tanh(adapted + rows[:, None, None]) * (1 + t[:, None, None, None])


@pytest.fixture(scope="module")
def update():
    return make_update(velocity, make_optimizer(SETTINGS), SETTINGS, SCALE)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    channels = LATENT[-1]
    valid = np.ones(M, bool)
    valid[[2, 7, 13]] = False
    return SimpleNamespace(
        params=normal(channels, channels),
        lora={"net": {"a": normal(channels, RANK), "b": 0.3 * normal(RANK, channels)}},
        old={"net": {"a": normal(channels, RANK), "b": 0.3 * normal(RANK, channels)}},
        conditioning=normal(PROMPTS, channels),
        t=rng.uniform(0.1, 1, (M, T)).astype(np.float32),
        samples={
            "x0": normal(M, *LATENT),
            "r": np.where(valid, rng.uniform(size=M), np.nan).astype(np.float32),
            "valid": valid,
            "prompt": rng.integers(0, PROMPTS, M).astype(np.int32),
            "sample": np.arange(100, 100 + M, dtype=np.uint32),
        },
    )


def run(update, problem, size=M, mesh=None, steps=1, settings=SETTINGS, **changed):
    """The state and metrics after `steps` updates in micro-batches of `size` samples, and the state before the last."""
    samples = problem.samples | changed
    rows = np.resize(np.arange(M), (-(-M // size), size))
    counted = np.arange(rows.size).reshape(rows.shape) < M
    parts = {name: array[rows] for name, array in samples.items()} | {"valid": counted & samples["valid"][rows]}
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        batch = shard_batch(parts, mesh, axis=1)
        batch["t"] = shard_batch(problem.t[rows].transpose(0, 2, 1), mesh, axis=2)
        params, conditioning, lora, old = replicate(
            (problem.params, problem.conditioning, problem.lora, problem.old), mesh
        )
        optimizer = make_optimizer(settings)
        state = init_state(lora, optimizer) | {"old": init_state(old, optimizer)["old"]}
        before = state
        for _ in range(steps):
            before, (state, metrics) = state, update(params, state, conditioning, batch, KEY)
    return to_numpy(state), {name: float(value) for name, value in metrics.items()}, to_numpy(before)


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same_step(got, expected):
    """The gradients (AdamW's first moment holds them) and the parameters agree to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, expected)


def assert_bit_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def whole(update, problem):
    """One update with all samples in one micro-batch."""
    return run(update, problem)


def test_the_step_is_adamw_on_the_clipped_mean_gradient(problem, whole):
    keep = np.flatnonzero(problem.samples["valid"])
    pairs = [(row, step) for row in keep for step in range(T)]
    rows, steps = np.array(pairs).T
    noise = jnp.stack(
        [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, step), problem.samples["sample"][row]), LATENT)
            for row, step in pairs
        ]
    )
    assert len(np.unique(np.asarray(noise)[:, 0, 0, 0])) == len(pairs)
    x0, r, t = problem.samples["x0"][rows], problem.samples["r"][rows], problem.t[rows, steps]
    share = t[:, None, None, None]
    x_t = (1 - share) * x0 + share * noise
    conditioning = problem.conditioning[problem.samples["prompt"][rows]]

    def policy(lora, scale):
        net = {"a": lora["net"]["a"], "b": scale * lora["net"]["b"]}
        return velocity(problem.params, {"net": net}, x_t, t, conditioning)

    def loss(lora):
        others = policy(problem.old, SCALE), policy(problem.lora, 0.0)
        return nft_loss(policy(lora, SCALE), *others, x_t, x0, t, r, beta=0.7, scale=5.0, kl_weight=0.3)

    (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(problem.lora)
    state, metrics, _ = whole
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    assert norm > 2 * SETTINGS.max_grad_norm
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad/norm"], norm, rtol=1e-5)
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert metrics["update/skipped"] == 0 and metrics["update/samples"] == len(keep)

    # AdamW's first step: both moments are those of this one gradient.
    clipped = jax.tree.map(lambda g: g * SETTINGS.max_grad_norm / norm, grads)
    stepped = jax.tree.map(
        lambda p, g: p - SETTINGS.learning_rate * (g / (np.abs(g) + SETTINGS.eps) + SETTINGS.weight_decay * p),
        problem.lora,
        clipped,
    )
    assert_same_step(state["lora"], to_numpy(stepped))
    averaged = jax.tree.map(lambda before, after: 2 / 11 * before + 9 / 11 * after, problem.lora, stepped)
    assert_same_step(state["ema"], to_numpy(averaged))
    assert_bit_equal(state["old"], problem.old)
    assert state["step"] == 1


@pytest.mark.parametrize("size", [4, 5])  # 5 does not divide 16: the last micro-batch is filled up
def test_micro_batches_do_not_change_the_step(update, problem, whole, size):
    state, metrics, _ = run(update, problem, size)
    assert_same_step(state, whole[0])
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_make_the_step_of_one(update, problem, whole, sizes):
    state, metrics, _ = run(update, problem, 8, make_mesh(*sizes))
    assert_same_step(state, whole[0])
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.fault("missing-reward")
@pytest.mark.parametrize("anything", [1e3, np.nan, np.inf])
def test_samples_that_count_for_nothing_may_hold_anything(update, problem, whole, anything):
    samples = problem.samples
    x0 = np.where(samples["valid"][:, None, None, None], samples["x0"], anything).astype(np.float32)
    r = np.where(samples["valid"], samples["r"], anything).astype(np.float32)
    state, metrics, _ = run(update, problem, x0=x0, r=r)
    assert_bit_equal(state, whole[0])
    assert metrics == whole[1]


MESHES = [None, (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


def on_every_device(tree):
    """What each device holds of a replicated tree, as host arrays."""
    return jax.tree.map(lambda array: [np.asarray(shard.data) for shard in array.addressable_shards], tree)


def poisoned_velocity(params, lora, x, t, rows):
    """`velocity`, whose gradient alone is NaN for the samples of a prompt with huge conditioning."""
    return _poison(velocity(params, lora, x, t, rows), jnp.abs(rows[:, :1, None, None]) > 100)


@jax.custom_vjp
def _poison(v, where):
    return v


_poison.defvjp(lambda v, where: (v, where), lambda where, g: (jnp.where(where, jnp.nan, g), None))


@pytest.mark.fault("not-finite")
@pytest.mark.parametrize("mesh_sizes", MESHES)
@pytest.mark.parametrize("bad", ["latent", "reward", "gradient"])
def test_a_bad_number_on_one_device_moves_nothing_on_any(problem, mesh_sizes, bad):
    mesh = mesh_sizes and make_mesh(*mesh_sizes)
    optimizer = make_optimizer(SETTINGS)
    update = make_update(poisoned_velocity if bad == "gradient" else velocity, optimizer, SETTINGS, SCALE)
    one = int(np.flatnonzero(problem.samples["valid"])[4])
    samples = problem.samples | {"prompt": np.where(np.arange(M) == one, PROMPTS, problem.samples["prompt"] % PROMPTS)}
    conditioning = np.concatenate([problem.conditioning, problem.conditioning[:1]])
    rows = np.arange(M).reshape(M // 8, 8)

    def updated(state, bad):
        changed, table = {name: array[rows] for name, array in samples.items()}, conditioning.copy()
        if bad == "latent":
            changed["x0"][one // 8, one % 8, 1, 2, 0] = np.nan
        elif bad == "reward":
            changed["r"][one // 8, one % 8] = np.inf
        elif bad == "gradient":
            table[PROMPTS] = 1e3
        batch = shard_batch(changed, mesh, axis=1)
        batch["t"] = shard_batch(problem.t[rows].transpose(0, 2, 1), mesh, axis=2)
        return update(*replicate((problem.params,), mesh), state, replicate(table, mesh), batch, KEY)

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        good, _ = updated(init_state(replicate(problem.lora, mesh), optimizer), None)
        before = on_every_device(good)
        after, metrics = updated(good, bad)
        assert metrics["update/skipped"] and metrics["update/samples"] == samples["valid"].sum()
        assert np.isfinite(metrics["loss/total"]) == (bad == "gradient") and not np.isfinite(metrics["grad/norm"])
        assert_bit_equal(on_every_device(after), before)
        assert_bit_equal(on_every_device(updated(after, None)[0]), on_every_device(updated(good, None)[0]))
    # Momentum is there to move things: it is not for want of any that nothing moved.
    assert any(np.abs(array).max() > 0 for array in jax.tree.leaves(to_numpy(good["optimizer"][1][0].mu)))


@pytest.mark.fault("missing-reward")
def test_a_group_without_rewards_is_as_one_that_was_never_drawn(update, problem):
    lost = problem.samples["prompt"] == problem.samples["prompt"][0]
    state, metrics, _ = run(update, problem, valid=problem.samples["valid"] & ~lost)
    without = SimpleNamespace(**vars(problem) | {"t": np.resize(problem.t[~lost], (M, T))})
    kept = {name: np.resize(array[~lost], (M, *array.shape[1:])) for name, array in problem.samples.items()}
    kept["valid"] = kept["valid"] & (np.arange(M) < (~lost).sum())  # filled up with samples that do not count
    expected, expected_metrics, _ = run(update, without, **kept)
    assert 0 < metrics["update/samples"] == expected_metrics["update/samples"] < M - 3
    assert_same_step(state, expected)


@pytest.mark.fault("equal-rewards")
def test_equal_rewards_leave_the_pull_to_the_reference_and_nothing_else(problem):
    """r = 1/2 everywhere and the old policy is the trained one, as in the first update of an epoch."""
    same, equal = SimpleNamespace(**vars(problem) | {"old": problem.lora}), {"r": np.full(M, 0.5, np.float32)}

    def step(**changed):
        settings = SimpleNamespace(**vars(SETTINGS) | changed)
        return run(make_update(velocity, make_optimizer(settings), settings, SCALE), same, settings=settings, **equal)

    state, metrics, _ = step()
    expected, pull, _ = step(adv_clip=0.0)  # the factor of the policy's part of the loss
    assert metrics["loss/policy"] > 0 == pull["loss/policy"] and metrics["update/skipped"] == 0 and state["step"] == 1
    np.testing.assert_allclose(metrics["grad/norm"], pull["grad/norm"], rtol=1e-5)
    assert_same_step(state, expected)
    _, nothing, _ = step(kl_weight=0.0)
    assert nothing["grad/norm"] < 1e-6 * metrics["grad/norm"]  # rounding


@pytest.mark.fault("missing-reward")
def test_nothing_valid_moves_nothing(update, problem):
    # A zero gradient would still let AdamW's decay and, later, its momentum move the parameters.
    state, metrics, before = run(update, problem, valid=np.zeros(M, bool))
    assert metrics["update/skipped"] == 1 and metrics["update/samples"] == 0 and metrics["loss/total"] == 0
    assert_bit_equal(state, before)


@pytest.mark.parametrize("mesh_sizes", [None, (2, 2, 2)])
def test_one_program_serves_all_updates(problem, mesh_sizes):
    update = make_update(velocity, make_optimizer(SETTINGS), SETTINGS, SCALE)
    mesh = mesh_sizes and make_mesh(*mesh_sizes)
    state, _, before = run(update, problem, 8, mesh, steps=3)
    run(update, problem, 8, mesh, valid=np.zeros(M, bool))
    assert update._cache_size() == 1
    assert state["step"] == 3 and np.abs(state["lora"]["net"]["a"] - before["lora"]["net"]["a"]).max() > 0


# The epoch's samples as batches


def groups(epoch: int = 3) -> EpochGroups:
    ids = np.repeat(np.arange(PROMPTS, dtype=np.int32), M // PROMPTS)
    numbers = np.arange(epoch * M, (epoch + 1) * M, dtype=np.uint32)
    return EpochGroups(epoch, (), np.arange(PROMPTS, dtype=np.int32), ids, numbers)


def batches(epoch=3, mesh=None, seed=0, **changed):
    settings = SimpleNamespace(**({"updates_per_epoch": 3, "micro_batch": 4, "timesteps": 2} | changed))
    latents = np.arange(M, dtype=np.float32)[:, None, None, None] + np.zeros(LATENT, np.float32)
    r, valid = np.linspace(0, 1, M), np.arange(M) % 5 != 0
    sigmas = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    return [to_numpy(b) for b in optimizer_batches(groups(epoch), latents, r, valid, sigmas, seed, settings, mesh)]


def counted(batch):
    """The samples of a batch that count, by their place in the epoch."""
    return sorted(batch["x0"][batch["valid"]][:, 0, 0, 0].astype(int))


def test_every_judged_sample_is_used_once():
    used = sorted(row for batch in batches() for row in counted(batch))
    assert used == [row for row in range(M) if row % 5]
    for batch in batches():
        rows = batch["x0"][..., 0, 0, 0].astype(int)
        np.testing.assert_array_equal(batch["sample"], 3 * M + rows)
        np.testing.assert_array_equal(batch["prompt"], rows // (M // PROMPTS))
        np.testing.assert_allclose(batch["r"], rows / (M - 1), rtol=1e-6)


def test_a_sample_is_trained_at_different_points_of_its_schedule():
    points = np.concatenate([batch["t"].transpose(0, 2, 1).reshape(-1, 2) for batch in batches()])
    assert set(points.ravel()) <= {1.0, 0.75, 0.5, 0.25}
    assert (points[:, 0] != points[:, 1]).all()
    assert len(np.unique(points, axis=0)) > 3


def test_all_batches_have_one_shape():
    shapes = [jax.tree.map(np.shape, batch) for batch in batches(updates_per_epoch=3)]
    assert len({str(shape) for shape in shapes}) == 1  # 16 samples in 3 updates: 6, 5 and 5


def test_the_epoch_and_the_seed_shuffle():
    first = [counted(batch) for batch in batches()]
    assert first == [counted(batch) for batch in batches()]
    assert first != [counted(batch) for batch in batches(epoch=4)]
    assert first != [counted(batch) for batch in batches(seed=1)]


def test_micro_batch_and_devices_do_not_change_who_is_in_an_update():
    def who(**given):
        return [
            sorted(
                zip(
                    batch["sample"][batch["valid"]].tolist(),
                    map(tuple, batch["t"].transpose(0, 2, 1)[batch["valid"]].tolist()),
                    strict=True,
                )
            )
            for batch in batches(**given)
        ]

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        [spread, *_] = batches(mesh=mesh, micro_batch=3)
        assert spread["x0"].shape[:2] == (2, 4)  # 3 does not divide over four parts of the mesh: 4 at a time
        on_mesh = who(mesh=mesh, micro_batch=3)
    assert who() == who(micro_batch=16) == who(micro_batch=1) == on_mesh
