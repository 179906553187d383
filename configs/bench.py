"""FIRM-Bench: how far critics are from people, several in one table (arXiv 2603.12247, section 3.3).

Variants: `:gen` and `:edit`, the paper's critic of each task beside the model that it was tuned from; `:tiny_gen` and
`:tiny_edit`, the critics and benchmarks that ship with the package (two CPU cores, nothing downloaded).
"""

from ml_collections import ConfigDict, config_dict

from firm_jax.config import choose_variant


def critic(model: str) -> dict:
    """One that is measured."""
    return {
        "model": model,
        "backend": "local",  # "firm" or "openai": on the servers of `endpoints`, under the name `model`
        "endpoints": (),
        "rubrics": config_dict.placeholder(str),  # None: the critic folder's own, else the package's
    }


def full(task: str, data: str, tuned: str) -> ConfigDict:
    """What both tasks have in common."""
    return ConfigDict(
        {
            "job": "bench",
            "task": task,
            "data": data,
            # The names in the published files are not known to us. "": not read; human_id: None is as id.
            "fields": {
                "id": "id",
                "human_id": config_dict.placeholder(str),
                "prompt": "prompt",
                "requirement": "requirement",
                "image": "image",
                "source": "source",
                "difficulty": "difficulty",
                "criterion": "criterion",
                "score": "score",
                "execution": "execution",
                "consistency": "consistency",
            },
            "max_bad_fraction": 0.05,
            "critics": {"critic": critic(tuned), "base": critic("Qwen/Qwen3-VL-8B-Instruct")},
            "dtype": config_dict.placeholder(str),  # None: bfloat16, float32 on a CPU
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "max_new_tokens": 1024,
            "batch_size": 64,
        }
    )


def gen() -> ConfigDict:
    """FIRM-Gen-8B and Qwen3-VL-8B on FIRM-Bench-Gen: instruction following."""
    return full("gen", "data/FIRM-Bench-Gen", "VisionXLab/FIRM-Gen-8B")


def edit() -> ConfigDict:
    """FIRM-Edit-8B and Qwen3-VL-8B on FIRM-Bench-Edit: execution and consistency."""
    return full("edit", "data/FIRM-Bench-Edit", "VisionXLab/FIRM-Edit-8B")


def tiny_gen() -> ConfigDict:
    """The miniature's critic of generation on 120 pictures of coloured shapes."""
    return tiny(gen())


def tiny_edit() -> ConfigDict:
    """The miniature's critic of editing on 120 edits of coloured shapes."""
    return tiny(edit())


def tiny(config: ConfigDict) -> ConfigDict:
    """The same with what ships, in about a minute on two CPU cores."""
    config.data = f"embedded:bench_{config.task}"
    config.critics = {"critic": critic(f"embedded:critic_{config.task}")}
    config.cpu_devices, config.mesh = 2, {"data": -1, "fsdp": 1, "tensor": 1}
    config.max_new_tokens = 512
    return config


VARIANTS = {"gen": gen, "edit": edit, "tiny_gen": tiny_gen, "tiny_edit": tiny_edit}


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant; there is no default, the variant says what is judged."""
    return choose_variant(VARIANTS, variant)
