"""The NFT loss and its gradient against a torch computation written from the formulas, and its fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from firm_jax.errors import ConfigError  # noqa: E402
from firm_jax.generation.schedules import noised  # noqa: E402
from firm_jax.rl.nft import ema_decay, mix, nft_loss, old_policy_decay, self_normalised_error  # noqa: E402

SHAPE = (5, 4, 3, 7)
NAMES = ("v", "v_old", "v_ref", "x_t", "x0", "t", "r")


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    x0, noise, v_ref = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    t = rng.uniform(0.05, 1.0, SHAPE[0]).astype(np.float32)
    shares = t[:, None, None, None]
    v_old = v_ref + 0.1 * rng.standard_normal(SHAPE).astype(np.float32)
    v = v_old + 0.1 * rng.standard_normal(SHAPE).astype(np.float32)
    x_t = (1 - shares) * x0 + shares * noise
    r = rng.uniform(size=SHAPE[0]).astype(np.float32)
    return {"v": v, "v_old": v_old, "v_ref": v_ref, "x_t": x_t, "x0": x0, "t": t, "r": r}


def torch_loss(batch, beta, scale, kl_weight, keep=None):
    """The formulas in float64. Returns the loss, its policy part, and the gradient with respect to v."""
    keep = np.ones(SHAPE[0], bool) if keep is None else keep
    v, v_old, v_ref, x_t, x0, t, r = (torch.tensor(batch[name], dtype=torch.float64)[keep] for name in NAMES)
    v.requires_grad_()
    dims, t = (1, 2, 3), t[:, None, None, None]

    def branch(velocity):
        error = x_t - t * velocity - x0
        weight = error.detach().abs().mean(dims).clamp(min=1e-5)
        return (error**2).mean(dims) / weight

    positive = branch(beta * v + (1 - beta) * v_old)
    negative = branch((1 + beta) * v_old - beta * v)
    policy = scale * ((r * positive + (1 - r) * negative) / beta).mean()
    kl = ((v - v_ref) ** 2).mean(dims).mean()
    loss = policy + kl_weight * kl
    loss.backward()
    gradient = np.zeros(SHAPE)
    gradient[keep] = v.grad.numpy()
    return loss.item(), policy.item(), kl.item(), gradient


@jax.jit
def loss_and_gradient(batch, beta, scale, kl_weight, valid):
    def loss(v):
        return nft_loss(**(batch | {"v": v}), beta=beta, scale=scale, kl_weight=kl_weight, valid=valid)

    return jax.value_and_grad(loss, has_aux=True)(batch["v"])


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("scale", [5.0, 0.5])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_loss_and_gradient_match_the_formulas(batch, beta, scale, kl_weight):
    loss, policy, kl, gradient = torch_loss(batch, beta, scale, kl_weight)
    (our_loss, terms), our_gradient = loss_and_gradient(batch, beta, scale, kl_weight, np.ones(SHAPE[0], bool))
    np.testing.assert_allclose(our_loss, loss, rtol=2e-6)
    np.testing.assert_allclose(terms["loss/total"], loss, rtol=2e-6)
    np.testing.assert_allclose(terms["loss/policy"], policy, rtol=2e-6)
    np.testing.assert_allclose(terms["loss/policy_unscaled"], policy / scale, rtol=2e-6)
    np.testing.assert_allclose(terms["policy/kl"], kl, rtol=2e-6)
    np.testing.assert_allclose(terms["policy/old_deviation"], np.square(batch["v"] - batch["v_old"]).mean(), rtol=2e-6)
    np.testing.assert_allclose(terms["rollout/x0_norm"], np.square(batch["x0"]).mean(), rtol=2e-6)
    assert np.linalg.norm(our_gradient - gradient) < 1e-5 * np.linalg.norm(gradient)


def test_invalid_samples_count_for_nothing(batch):
    keep = np.array([True, False, True, True, False])
    loss, _, kl, gradient = torch_loss(batch, 1.0, 5.0, 0.3, keep)
    masked = batch | {"r": np.where(keep, batch["r"], np.nan).astype(np.float32)}
    (our_loss, terms), our_gradient = loss_and_gradient(masked, 1.0, 5.0, 0.3, keep)
    np.testing.assert_allclose(our_loss, loss, rtol=2e-6)
    np.testing.assert_allclose(terms["policy/kl"], kl, rtol=2e-6)
    np.testing.assert_array_equal(our_gradient[~keep], 0)
    assert np.linalg.norm(our_gradient - gradient) < 1e-5 * np.linalg.norm(gradient)


def test_a_batch_without_a_valid_sample_is_zero(batch):
    (loss, terms), gradient = loss_and_gradient(batch, 1.0, 5.0, 0.3, np.zeros(SHAPE[0], bool))
    assert loss == 0 and np.all(np.asarray(gradient) == 0)
    assert all(term == 0 for term in terms.values())


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_at_the_old_policy_the_gradient_is_the_positive_branch_s_times_2r_minus_1(batch, beta):
    at_old = batch | {"v": batch["v_old"]}

    def gradient(r):
        return loss_and_gradient(at_old | {"r": r}, beta, 5.0, 0.0, np.ones(SHAPE[0], bool))[1]

    single_branch = gradient(np.ones(SHAPE[0], np.float32))
    expected = (2 * batch["r"] - 1)[:, None, None, None] * single_branch
    np.testing.assert_allclose(gradient(batch["r"]), expected, atol=1e-6 * np.abs(single_branch).max())
    indifferent = gradient(np.full(SHAPE[0], 0.5, np.float32))
    assert np.abs(indifferent).max() < 1e-6 * np.abs(single_branch).max()


def test_only_the_trained_policy_receives_a_gradient(batch):
    def loss(v, v_old, v_ref):
        others = batch | {"v": v, "v_old": v_old, "v_ref": v_ref}
        return nft_loss(**others, beta=0.5, scale=5.0, kl_weight=0.3)[0]

    towards = jax.grad(loss, argnums=(0, 1, 2))(*(batch[name] for name in ("v", "v_old", "v_ref")))
    assert jnp.any(towards[0] != 0)
    assert jnp.all(towards[1] == 0) and jnp.all(towards[2] == 0)


def test_a_perfect_prediction_stays_finite(batch):
    still = np.zeros(SHAPE, np.float32)
    exact = batch | {"x_t": batch["x0"], "v": still, "v_old": still}
    (loss, _), gradient = loss_and_gradient(exact, 1.0, 5.0, 0.0, np.ones(SHAPE[0], bool))
    assert loss == 0 and np.all(np.isfinite(gradient))


def test_half_precision_arguments_are_computed_in_float32(batch):
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in batch.items()}
    rounded = {name: np.asarray(array, np.float32) for name, array in half.items()}
    loss, _ = nft_loss(**half, beta=1.0, scale=5.0, kl_weight=1e-4)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, nft_loss(**rounded, beta=1.0, scale=5.0, kl_weight=1e-4)[0], rtol=1e-6)


def test_self_normalised_error_by_hand():
    prediction = jnp.array([[1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(self_normalised_error(prediction, jnp.zeros((2, 2))), [5.0 / 2.0, 0.0])


def test_noised_walks_from_image_to_noise():
    x0, noise = jnp.ones((3, 2, 2)), jnp.full((3, 2, 2), 5.0)
    result = noised(x0, noise, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(result[:, 0, 0], [1.0, 2.0, 5.0])


@pytest.mark.parametrize(
    ("decay_type", "steps", "expected"),
    [
        (0, [0, 1, 10_000], [0, 0, 0]),
        (1, [0, 1, 150, 500, 600], [0, 0.001, 0.15, 0.5, 0.5]),
        (2, [0, 74, 75, 76, 175, 1000], [0, 0, 0, 0.0075, 0.75, 0.999]),
    ],
)
def test_decay_of_the_old_policy(decay_type, steps, expected):
    decay = jax.jit(old_policy_decay, static_argnums=1)
    np.testing.assert_allclose([decay(step, decay_type) for step in steps], expected, rtol=1e-6)


def test_an_unknown_decay_type_is_named():
    with pytest.raises(ConfigError, match="3"):
        old_policy_decay(0, 3)


def test_decay_of_the_average_reaches_its_cap():
    np.testing.assert_allclose([ema_decay(s, 0.9) for s in (1, 79, 80, 500)], [2 / 11, 80 / 89, 0.9, 0.9], rtol=1e-6)


def test_mix_keeps_that_share():
    kept, new = {"a": jnp.array([1.0]), "b": [jnp.array([0.0])]}, {"a": jnp.array([3.0]), "b": [jnp.array([10.0])]}
    mixed = mix(kept, new, 0.25)
    np.testing.assert_allclose(mixed["a"], [2.5])
    np.testing.assert_allclose(mixed["b"][0], [7.5])
