"""What an RL config is refused for before anything is loaded."""

from firm_jax.critic.rubric import RUBRICS
from firm_jax.critic.score import ANSWERS
from firm_jax.errors import ConfigError
from firm_jax.generation.solvers import SOLVERS
from firm_jax.models.layers import REMAT_POLICIES
from firm_jax.models.quantize import check_scheme
from firm_jax.rl.advantages import ADVANTAGE_MODES
from firm_jax.rl.judging import BACKENDS, check_critic
from firm_jax.rl.nft import old_policy_decay
from firm_jax.rl.rewards import Reward, resolve_reward
from firm_jax.rl.rollout import OF_EDITS
from firm_jax.rl.start import check_init

# Numbers that a run cannot do without.
POSITIVE = (
    "group.prompts_per_epoch lora.rank rollout.steps rollout.batch_size critic.batch_size critic.max_new_tokens "
    "train.micro_batch train.learning_rate train.beta train.adv_clip train.max_grad_norm "
    "eval.every eval.prompts eval.images_per_prompt eval.steps eval.batch_size"
).split()

# What only a config of an editing job has.
EDITING = (
    "prompts.image_folder "
    "rollout.source_area rollout.condition_area rollout.crop_sources "
    "eval.source_area eval.condition_area eval.crop_sources"
).split()


def check_config(config) -> None:
    """ConfigError for values that would fail, or silently do nothing, only after minutes of loading."""
    train, group = config.train, config.group
    for name in POSITIVE:
        section, key = name.split(".")
        if not config[section][key] > 0:
            raise ConfigError(f"{name} is {config[section][key]}; it is above 0")
    if not 0 <= config.critic.max_failure_rate <= 1:
        raise ConfigError(f"critic.max_failure_rate is {config.critic.max_failure_rate}; it is a share, 0 to 1")
    reward = resolve_reward(config.reward.name, config.reward.weights)
    if unknown := sorted(set(reward.criteria) - set(RUBRICS)):
        raise ConfigError(
            f"reward.name {reward.name!r} needs {', '.join(unknown)}, which no rubric here asks for; the critic judges "
            f"{', '.join(RUBRICS)}"
        )
    old_policy_decay(0, train.decay_type)
    check_scheme(config.quantize)
    check_init(config.lora.init)
    if group.images_per_prompt < 2:
        raise ConfigError(
            f"group.images_per_prompt is {group.images_per_prompt}: an advantage is a reward against the mean of its "
            "group, always zero with one image. Set it to 2 or more."
        )
    if not 1 <= train.timesteps <= config.rollout.steps:
        raise ConfigError(f"train.timesteps is {train.timesteps}; it is 1 to rollout.steps = {config.rollout.steps}")
    if not 1 <= train.updates_per_epoch <= group.prompts_per_epoch * group.images_per_prompt:
        raise ConfigError(f"train.updates_per_epoch is {train.updates_per_epoch}: more updates than images, or none")
    for name, value, known in (
        ("rollout.solver", config.rollout.solver, SOLVERS),
        ("eval.solver", config.eval.solver, SOLVERS),
        ("train.adv_mode", train.adv_mode, ADVANTAGE_MODES),
        ("train.remat", train.remat, REMAT_POLICIES),
        ("critic.score", config.critic.score, ("parsed", "expected")),
        ("critic.answer", config.critic.answer, ANSWERS),
        ("critic.backend", config.critic.backend, BACKENDS),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; it is one of: {', '.join(known)}")
    check_critic(config.critic)


def check_editing(config, reward: Reward, edits: bool) -> None:
    """ConfigError when the reward or the config is for editing and the pipeline is not, or the other way round."""
    unfit = [criterion for criterion in reward.criteria if (criterion in OF_EDITS) != edits]
    if unfit and edits:
        raise ConfigError(
            f"reward.name {reward.name!r} asks for {', '.join(unfit)} of pictures drawn from text alone, and "
            f"{config.model} edits source images. Set reward.name to cme, as configs/edit_cme.py does, or model to a "
            "text-to-image pipeline."
        )
    if unfit:
        raise ConfigError(
            f"reward.name {reward.name!r} asks for {', '.join(unfit)}, which compare a picture with its source image, "
            f"and {config.model} draws from text alone. Set reward.name to qma, or model to an editing pipeline, as "
            "configs/edit_cme.py does."
        )
    if not edits:
        return
    if missing := [name for name in EDITING if name.split(".")[1] not in config[name.split(".")[0]]]:
        raise ConfigError(
            f"{config.model} edits source images, and the config has no {', '.join(missing)}. Start from "
            "configs/edit_cme.py."
        )
    for name in EDITING:
        section, key = name.split(".")
        if key.endswith("_area") and not config[section][key] > 0:
            raise ConfigError(f"{name} is {config[section][key]}; it is a number of pixels, above 0")
