"""Fine-tuning of critics on conversations: `:edit`, the default, and `:gen` at full size; `:tiny_edit` and `:tiny_gen`
in miniature.

The batch is fixed: how many devices share it, and in how many micro-batches, changes no recipe.
"""

from ml_collections import ConfigDict, config_dict

from firm_jax.config import choose_variant

LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION = ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")  # of the tower and of the projector


def edit() -> ConfigDict:
    """FIRM-Edit-8B as its model card tells: 160 examples a step (10 x 2 x 8 devices), one epoch, 1 % held out.

    What the card leaves open is as LLaMA-Factory has it where nothing is set: vision tower and projector frozen, images
    of up to 768 x 768 pixels, no weight decay.
    """
    config = ConfigDict()
    config.job = "critic_sft"
    config.seed = 42
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.distributed = False
    config.critic = {"model": "Qwen/Qwen3-VL-8B-Instruct", "rubrics": config_dict.placeholder(str)}
    config.data = {"source": "", "held_out": config_dict.placeholder(str), "held_out_share": 0.01}
    config.data.update({"image_folder": config_dict.placeholder(str), "max_bad_fraction": 0.001})
    parts = ("messages", "images", "criterion", "id")
    config.data.columns = {part: config_dict.placeholder(str) for part in parts}
    config.data.max_pixels = 768 * 768
    config.data.update({"examples": 0, "samples": config_dict.placeholder(str), "samples_share": 0.0})
    config.tune = {"vision": False, "projector": False, "language": True}
    config.tune.update({f"{part}_learning_rate": config_dict.placeholder(float) for part in config.tune})
    config.lora = {"rank": 0, "alpha": 32.0, "targets": LANGUAGE + VISION}
    config.train = {"epochs": 1, "steps_per_epoch": config_dict.placeholder(int), "batch_size": 160}
    config.train.update({"packing": False, "packed_images": 8})
    config.train.update({"examples_per_device": 10, "lengths": (1536, 2048, 2560, 3072)})
    config.train.update({"learning_rate": 1e-5, "warmup_ratio": 0.1, "max_grad_norm": 1.0})
    config.train.update({"b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "verdict_weight": 1.0})
    config.train.update({"compute_dtype": "bfloat16", "param_dtype": "float32", "moment_dtype": "float32"})
    config.train.update({"stored_dtype": "bfloat16", "remat": "full", "report_every": 0.01})
    config.eval = {"every": 0.2, "examples": 0, "answers": 256, "batch_size": 64, "max_new_tokens": 512}
    config.eval.update({"bench": config_dict.placeholder(str), "bench_task": "edit"})
    config.checkpoint = {"every": 0.05, "keep": 2}
    config.profile = {"start": 0, "steps": 0}
    return config


def gen() -> ConfigDict:
    """FIRM-Gen-8B as far as its model card tells: 5 examples a device; 80 a step, with the other's accumulation."""
    config = edit()
    config.train.update({"batch_size": 80, "examples_per_device": 5})
    config.eval.bench_task = "gen"
    return config


def tiny_edit() -> ConfigDict:
    """The miniature's describer, which sees and does not judge, learns to judge edits, on two CPU cores in minutes."""
    config = edit()
    config.seed = 0
    config.cpu_devices, config.mesh = 2, {"data": -1, "fsdp": 1, "tensor": 1}
    config.critic = {"model": "embedded:describer", "rubrics": "embedded:critic_edit/rubrics"}
    config.data.update({"source": "shapes_edits", "examples": 4_000, "held_out_share": 0.05, "max_pixels": 64 * 64})
    config.tune.update({"vision": True, "projector": True})
    config.train.update({"epochs": 1, "batch_size": 16, "examples_per_device": 8, "lengths": (176, 192, 232)})
    config.train.update({"learning_rate": 1e-3, "b2": 0.98, "verdict_weight": 8.0, "report_every": 0.1})
    config.train.update({"compute_dtype": "float32", "stored_dtype": "float16"})
    config.eval.update({"every": 1.0, "examples": 128, "batch_size": 128, "max_new_tokens": 192})
    config.eval.bench = "embedded:bench_edit"
    config.checkpoint.every = 0.2
    return config


def tiny_gen() -> ConfigDict:
    """The miniature's describer learns to judge generated pictures, on two CPU cores in minutes."""
    config = tiny_edit()
    config.critic.rubrics = "embedded:critic_gen/rubrics"
    config.data.source = "shapes"
    config.eval.update({"bench": "embedded:bench_gen", "bench_task": "gen", "max_new_tokens": 320})
    config.train.lengths = (160, 224, 272, 320, 400)  # the last two for what configs/curate.py:tiny_gen makes
    return config


VARIANTS = {"": edit, "edit": edit, "gen": gen, "tiny_edit": tiny_edit, "tiny_gen": tiny_gen}


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant of this job."""
    return choose_variant(VARIANTS, variant)
