"""Text-to-image RL with QMA: DiffusionNFT on SD3.5-medium, judged by FIRM-Gen-8B (arXiv 2603.12247).

Variants: none, the paper's recipe; `:code`, the recipe of its published code; `:t5_128`, the paper's with the shorter
texts of that code; `:tiny`, the miniature that ships with the package (two CPU cores, nothing downloaded);
`:qwen_image`, Qwen-Image in the place of SD3.5, which only the code has a recipe for; `:qwen_image_tiny`, the same in
miniature.
"""

from ml_collections import ConfigDict, config_dict

from firm_jax.config import choose_variant

ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
TINY_QWEN_IMAGE = "embedded:qwen_image"


def paper() -> ConfigDict:
    """48 prompts x 16 images, 600 steps, LoRA rank 32, ten dpm2 steps without guidance at 512 x 512."""
    config = ConfigDict()
    config.job = "rl"
    config.seed = 42
    config.model = "stabilityai/stable-diffusion-3.5-medium"
    config.dtype = "bfloat16"
    config.quantize = config_dict.placeholder(str)  # "int8": the frozen kernels of the transformer's blocks
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}  # a whole copy of the weights takes 32 GiB
    config.distributed = False  # several processes, one a host
    config.prompts = {
        "train": "data/ShareGPT-4o-Image/text_to_image.json",
        "held_out": config_dict.placeholder(str),  # None: 2 % of the training prompts
        "max_bad_fraction": 0.001,
    }
    config.group = {"prompts_per_epoch": 48, "images_per_prompt": 16}
    # init: "gaussian", or the folder or file of a LoRA of the same rank, alpha and targets to go on from.
    config.lora = {"rank": 32, "alpha": 64.0, "targets": ATTENTION, "init": "gaussian"}
    config.rollout = {
        "steps": 10,
        "solver": "dpm2",
        "guidance": 1.0,
        "height": 512,
        "width": 512,
        "max_text_tokens": 256,
        "batch_size": 64,
    }
    config.critic = {
        "model": "VisionXLab/FIRM-Gen-8B",
        "backend": "local",  # "firm" or "openai": on the servers of `endpoints`, see docs/serving.md
        "endpoints": (),
        "concurrency": 16,  # requests in flight
        "connect_timeout": 5.0,  # seconds, as the next two
        "try_timeout": 300.0,
        "timeout": 600.0,  # of a request with all its tries
        "attempts": 5,
        "rubrics": config_dict.placeholder(str),  # None: the critic folder's own, else the package's
        "batch_size": 128,
        "max_new_tokens": 1024,
        "answer": "whole",
        "score": "parsed",
        "max_failure_rate": 0.2,
    }
    config.reward = {"name": "qma", "weights": {"base": 0.4, "bonus": 0.6}}
    config.train = {
        "epochs": 600,
        "updates_per_epoch": 1,
        "micro_batch": 64,  # weights are gathered anew for each: fewer, larger ones move less
        "timesteps": 9,  # of the rollout's ten: int(10 * 0.99)
        "learning_rate": 3e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "beta": 1.0,
        "kl_weight": 1e-4,
        "adv_clip": 5.0,
        "adv_mode": "all",
        "global_std": True,
        "decay_type": 1,
        "ema": 0.9,
        "ban_solved_prompts": False,
        "max_skipped_updates": 3,
        "remat": "full",
    }
    config.eval = {
        "every": 50,
        "prompts": 128,
        "images_per_prompt": 1,
        "judged": 128,
        "oracle": False,
        "steps": 40,
        "solver": "euler",
        "guidance": 1.0,
        "height": 512,
        "width": 512,
        "max_text_tokens": 256,
        "batch_size": 64,
    }
    config.checkpoint = {"every": 10, "keep": 3}
    config.profile = {"start": 0, "steps": 0}
    return config


def code() -> ConfigDict:
    """Where the published code departs from the paper: 12 images a prompt, no end, T5 texts cut at 128 tokens."""
    config = t5_128()
    config.group.images_per_prompt = 12
    config.train.epochs = 100_000
    return config


def t5_128() -> ConfigDict:
    """The paper's recipe with T5 texts of 128 tokens instead of 256."""
    config = paper()
    config.rollout.max_text_tokens = config.eval.max_text_tokens = 128
    return config


def tiny() -> ConfigDict:
    """The whole system in miniature: 64 x 64 pictures of coloured shapes, on two CPU cores in minutes."""
    config = paper()
    config.model, config.dtype = "embedded:sd3", "float32"
    config.seed = 0
    config.cpu_devices, config.mesh = 2, {"data": -1, "fsdp": 1, "tensor": 1}
    config.prompts.update(
        {"train": "embedded:prompts/train_metadata.jsonl", "held_out": "embedded:prompts/test_metadata.jsonl"}
    )
    config.group = {"prompts_per_epoch": 12, "images_per_prompt": 12}
    config.lora.update({"rank": 16, "alpha": 32.0})
    size = {"height": 64, "width": 64, "max_text_tokens": 17}
    config.rollout.update({**size, "batch_size": 144})
    config.critic.update({"model": "embedded:critic_gen", "batch_size": 144, "max_new_tokens": 128})
    config.train.update(
        {
            "epochs": 70,
            "updates_per_epoch": 5,
            "micro_batch": 36,
            "timesteps": 3,
            "learning_rate": 3e-3,
            "remat": "full",
        }
    )
    config.eval.update(
        {
            **size,
            "every": 35,
            "prompts": 576,
            "images_per_prompt": 2,
            "judged": 144,
            "oracle": True,
            "steps": 10,
            "solver": "dpm2",
            "batch_size": 192,
        }
    )
    config.checkpoint.every = 10
    return config


def qwen_image() -> ConfigDict:
    """Qwen-Image: 32 prompts x 16 images, LoRA rank 64 on attention and feed-forward, 50 Euler steps.

    As the published code trains it, but for two things. There every pass has a guidance of 4, in the loss too; here
    there is none, as in the paper's own two recipes. There two neighbouring steps of each rollout are stochastic and
    trained on, the same two for the whole run; here no step is, and two of the fifty are drawn anew for every image.
    """
    config = paper()
    config.model = "Qwen/Qwen-Image"
    config.group = {"prompts_per_epoch": 32, "images_per_prompt": 16}
    config.lora = {"rank": 64, "alpha": 128.0, "targets": ATTENTION + FEED_FORWARD, "init": "gaussian"}
    config.rollout.update({"steps": 50, "solver": "euler", "max_text_tokens": 512})
    config.train.update({"timesteps": 2, "learning_rate": 1e-4, "kl_weight": 0.0, "ema": 0.0})  # no average, no KL
    config.train.micro_batch = 16
    config.eval.update({"every": 30, "steps": 50, "max_text_tokens": 512})
    return config


def qwen_image_tiny() -> ConfigDict:
    """`:tiny` with the miniature of Qwen-Image."""
    config = tiny()
    config.model = TINY_QWEN_IMAGE
    config.lora.targets = ATTENTION + FEED_FORWARD
    config.rollout.max_text_tokens = config.eval.max_text_tokens = 32
    return config


VARIANTS = {
    "": paper,
    "code": code,
    "t5_128": t5_128,
    "tiny": tiny,
    "qwen_image": qwen_image,
    "qwen_image_tiny": qwen_image_tiny,
}


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant of this job."""
    return choose_variant(VARIANTS, variant)
