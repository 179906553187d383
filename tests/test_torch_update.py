"""One NFT update of an SD3 transformer's LoRA against PyTorch: diffusers' network, PEFT's adapters, torch's AdamW."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from torch_parity import randomise, relative_error  # noqa: E402

from firm_jax.generation import Conditioning, initial_noise  # noqa: E402
from firm_jax.generation.sd3 import SD3Generator  # noqa: E402
from firm_jax.models import from_pretrained, lora  # noqa: E402
from firm_jax.rl.update import init_state, make_optimizer, make_update  # noqa: E402

SD35 = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=14,
    caption_projection_dim=24,
    pooled_projection_dim=10,
    pos_embed_max_size=5,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA = lora.LoraConfig(rank=3, alpha=5.0, targets=tuple(f"attn.{name}" for name in TARGETS))
TRAIN = SimpleNamespace(
    learning_rate=3e-3, b1=0.9, b2=0.999, eps=1e-5, weight_decay=0.1, max_grad_norm=0.5,
    beta=0.6, adv_clip=5.0, kl_weight=0.2, ema=0.9,
)  # fmt: skip
A, B, T, LATENT = 2, 2, 2, (6, 4, 4)
KEY = jax.random.key(9)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The reference with two PEFT adapters, `current` and `old`, and our network of the same weights."""
    folder = tmp_path_factory.mktemp("transformer")
    reference = diffusers.SD3Transformer2DModel(**SD35)
    randomise(reference)
    reference.save_pretrained(folder)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets))
    adapted = peft.get_peft_model(reference.eval(), config, adapter_name="current")
    adapted.add_adapter("old", config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted, from_pretrained(folder)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    conditioning = Conditioning(
        rng.normal(size=(3, 5, 14)).astype(np.float32), rng.normal(size=(3, 10)).astype(np.float32)
    )
    return conditioning, {
        "x0": rng.normal(size=(A, B, *LATENT)).astype(np.float32),
        "t": rng.uniform(0.1, 1, (A, T, B)).astype(np.float32),
        "r": rng.uniform(size=(A, B)).astype(np.float32),
        "valid": np.ones((A, B), bool),
        "prompt": np.array([[2, 0], [0, 1]], np.int32),
        "sample": np.arange(40, 44, dtype=np.uint32).reshape(A, B),
    }


def tree_of(adapted, model, adapter: str, get):
    """Our tree of a PEFT adapter, made of `get(parameter)`: the parameters themselves, or their gradients."""
    named = dict(adapted.named_parameters())
    first = {"dual_blocks": 0, "blocks": model.config.dual_layers, "last_block": model.config.num_layers - 1}

    def matrix(block: int, module: str, side: str):
        name = f"base_model.model.transformer_blocks.{block}.{module}.lora_{side.upper()}.{adapter}.weight"
        return get(named[name]).detach().numpy().T.copy()

    def leaf(path, shape):
        stack, *module, side = (key.key for key in path)
        module = ".".join(module)
        if stack == "last_block":
            return matrix(first[stack], module, side)
        return np.stack([matrix(first[stack] + layer, module, side) for layer in range(shape.shape[0])])

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: lora.init_lora(KEY, nnx.state(model), LORA)))


def torch_loss(adapted, conditioning, batch):
    """The DiffusionNFT loss as its paper has it, over all samples and timesteps; leaves `current` with its gradient."""
    pairs = [(a, b, j) for a in range(A) for b in range(B) for j in range(T)]
    noise = [initial_noise(jax.random.fold_in(KEY, j), batch["sample"][a, b : b + 1], LATENT)[0] for a, b, j in pairs]

    def tensor(arrays):
        return torch.from_numpy(np.stack(arrays))

    x0 = tensor([np.moveaxis(batch["x0"][a, b], -1, 0) for a, b, _ in pairs])
    noise = tensor([np.moveaxis(np.asarray(array), -1, 0) for array in noise])
    t, r = tensor([batch["t"][a, j, b] for a, b, j in pairs]), tensor([batch["r"][a, b] for a, b, _ in pairs])
    prompt = [batch["prompt"][a, b] for a, b, _ in pairs]
    share, dims = t[:, None, None, None], (1, 2, 3)
    x_t = (1 - share) * x0 + share * noise

    def velocity():
        return adapted(
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=torch.from_numpy(conditioning.context)[prompt],
            pooled_projections=torch.from_numpy(conditioning.pooled)[prompt],
            return_dict=False,
        )[0]

    with torch.no_grad():
        adapted.set_adapter("old")
        v_old = velocity()
        with adapted.disable_adapter():
            v_ref = velocity()
    adapted.set_adapter("current")
    v = velocity()

    def branch(implicit):
        error = x_t - share * implicit - x0
        return (error**2).mean(dims) / error.detach().abs().mean(dims).clamp(min=1e-5)

    beta = TRAIN.beta
    positive, negative = branch(beta * v + (1 - beta) * v_old), branch((1 + beta) * v_old - beta * v)
    policy = TRAIN.adv_clip * ((r * positive + (1 - r) * negative) / beta).mean()
    kl, deviation = ((v - v_ref) ** 2).mean(), ((v - v_old) ** 2).mean()
    loss = policy + TRAIN.kl_weight * kl
    loss.backward()
    return {"loss/total": loss, "loss/policy": policy, "policy/kl": kl, "policy/old_deviation": deviation}


def test_an_update_equals_torch(networks, batch):
    adapted, model = networks
    conditioning, samples = batch
    tree = partial(tree_of, adapted, model)
    before = tree("current", lambda parameter: parameter)
    graphdef, params = nnx.split(model)
    velocity = partial(SD3Generator.velocity, SimpleNamespace(graphdef=graphdef, timesteps=1000), remat="full")
    optimizer = make_optimizer(TRAIN)
    state = init_state(before, optimizer) | {"old": tree("old", lambda parameter: parameter)}
    update = make_update(velocity, optimizer, TRAIN, LORA.scale)
    state, metrics = update(params, state, conditioning, samples, KEY)

    expected = torch_loss(adapted, conditioning, samples)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-5, err_msg=name)

    gradients = tree("current", lambda parameter: parameter.grad)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    assert norm > 2 * TRAIN.max_grad_norm
    np.testing.assert_allclose(metrics["grad/norm"], norm, rtol=1e-4)
    # After one step AdamW's first moment is 1 - b1 of the clipped gradient.
    moment = optax.tree.get(state["optimizer"], "mu")
    ours = jax.tree.map(lambda mu: mu / (1 - TRAIN.b1) * norm / TRAIN.max_grad_norm, moment)
    for got, gradient in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients), strict=True):
        # Not a quotient: the last block's text queries feed nothing, and their gradients are zero on both sides.
        assert np.linalg.norm(got - gradient) <= 1e-4 * np.linalg.norm(gradient)

    trained = [parameter for name, parameter in adapted.named_parameters() if ".current." in name]
    torch.nn.utils.clip_grad_norm_(trained, TRAIN.max_grad_norm)
    torch.optim.AdamW(
        trained, lr=TRAIN.learning_rate, betas=(TRAIN.b1, TRAIN.b2), eps=TRAIN.eps, weight_decay=TRAIN.weight_decay
    ).step()
    after = tree("current", lambda parameter: parameter)
    for start, ours, theirs in zip(*map(jax.tree.leaves, (before, state["lora"], after)), strict=True):
        assert relative_error(ours - start, theirs - start) < 1e-3
