"""DiffusionNFT with a critic's rewards: sample, judge, reward, advantage, update, mix."""

import jax

from firm_jax.mesh import make_mesh
from firm_jax.rl.advantages import advantage_to_r, advantages
from firm_jax.rl.checks import check_config
from firm_jax.rl.job import Job
from firm_jax.rl.nft import mix, old_policy_decay
from firm_jax.run import Run


def train(config, workdir: str) -> None:
    """The RL job: trains a LoRA of the generator on the critic's rewards and leaves the run's folder in `workdir`.

    Raises ConfigError, WeightsError and DataError before anything is drawn; CriticError and NonFiniteError, with the
    run saved, when judgements or numbers fail more often than the config tolerates.
    """
    check_config(config)
    settings, mesh = config.train, make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        job = Job(config, mesh)
        with Run(config, workdir, job.base_weights) as run:
            state, done = job.begin(run)
            for _ in run.loop(done, settings.epochs):
                group = job.next_group(state)
                latents, images = job.sample(state["old"], group)
                judged = job.judge(images)
                rewards, valid = job.reward(images, judged, group)

                advantage = advantages(rewards, group.group_ids, valid, global_std=settings.global_std)
                r = advantage_to_r(advantage, clip=settings.adv_clip, mode=settings.adv_mode)
                state, terms = job.update(state, group, latents, r, valid)
                if terms["update/made"]:
                    decay = old_policy_decay(state["step"], settings.decay_type)
                    state["old"] = mix(state["old"], state["lora"], decay)

                job.end_epoch(state, group, judged, rewards, valid, terms)
