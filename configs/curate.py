"""Critic data made by teachers: records in, selected examples out (FIRM, arXiv 2603.12247, section 3).

Variants: `:gen`, plan-then-score; `:edit`, difference-first; `:tiny_gen` and `:tiny_edit`, the same in miniature with
the shapes world's oracle as teacher (nothing downloaded, no network). `--config.recipe=single_pass` asks the judge by
the critic's rubric alone, to compare with.
"""

from ml_collections import ConfigDict, config_dict

from firm_jax.config import choose_variant


def _teacher(model: str) -> dict:
    """A model behind OpenAI-compatible endpoints. The prices are of a million tokens; 0 is a server of your own."""
    return {
        "model": model,
        "endpoints": (),
        "key_variable": "FIRM_JAX_TEACHER_KEY",
        "price_in": 0.0,
        "price_out": 0.0,
        "requests_per_minute": config_dict.placeholder(int),
        "tokens_per_minute": config_dict.placeholder(int),
        "image_tokens": 4096,
        "temperature": 0.0,
    }


def _curation(task: str, recipe: str) -> ConfigDict:
    """What both tasks have in common."""
    config = ConfigDict()
    config.job = "curation"
    config.task = task
    config.recipe = recipe
    config.seed = 42
    config.rubrics = config_dict.placeholder(str)  # None: the package's
    config.records = {"source": f"data/curate_{task}.jsonl", "max_bad_fraction": 0.01}
    config.teachers = {"backend": "openai"}
    config.engine = "embedded"
    config.ray = {"workers": 4}
    config.requests = {
        "concurrency": 64,
        "connect_timeout": 5.0,  # seconds, as the next two
        "try_timeout": 300.0,
        "timeout": 900.0,  # of a call with all its tries
        "attempts": 5,
    }
    config.budget = {"money": config_dict.placeholder(float), "tokens": config_dict.placeholder(int)}
    config.selection = {
        "near_levels": 32,
        "benchmarks": (),
        "benchmark_fields": (),
        "contradictions": True,
        "per_score": config_dict.placeholder(int),
    }
    config.output = {"formats": ("parquet", "jsonl"), "held_out": 0.01, "samples": 2}
    config.log_every = 100
    return config


def gen() -> ConfigDict:
    """Plan-then-score with the paper's models: Qwen3-32B plans, Qwen3-VL-235B-A22B judges."""
    config = _curation("gen", "plan_then_score")
    config.mismatch = {"share": 0.0, "how": "exchange"}  # of generation the paper tells of none
    config.teachers.planner = _teacher("Qwen/Qwen3-32B")
    config.teachers.judge = _teacher("Qwen/Qwen3-VL-235B-A22B-Instruct")
    return config


def edit() -> ConfigDict:
    """Difference-first, with low scores on purpose. The paper names neither its models nor the share: both are ours."""
    config = _curation("edit", "difference_first")
    config.mismatch = {"share": 0.2, "how": "rewrite"}
    config.teachers.planner = _teacher("Qwen/Qwen3-32B")
    for role in ("describer", "judge"):
        config.teachers[role] = _teacher("Qwen/Qwen3-VL-235B-A22B-Instruct")
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    """The shapes world in the place of records and teachers. Its prices are nominal: nothing is paid."""
    config.seed = 0
    config.rubrics = f"embedded:critic_{config.task}/rubrics"
    config.records.source = "shapes"
    config.teachers = {"backend": "oracle"}
    for role in ("planner", "describer", "judge") if config.task == "edit" else ("planner", "judge"):
        config.teachers[role] = _teacher("oracle")
        config.teachers[role].update({"price_in": 0.2, "price_out": 0.8, "image_tokens": 64})
    config.budget.money = 5.0
    config.selection.benchmarks = (f"embedded:bench_{config.task}",)
    config.output.held_out = 0.05
    return config


def tiny_gen() -> ConfigDict:
    """Plan-then-score in miniature: 64 x 64 pictures of coloured shapes, judged by the oracle with tired eyes."""
    config = _tiny(gen())
    config.mismatch.share = 0.25
    config.selection.per_score = 150
    config.shapes = {"count": 800, "faults": {"wrong": 0.35}, "miss": 0.12, "skip": 0.3}
    return config


def tiny_edit() -> ConfigDict:
    """Difference-first in miniature: edits of such pictures, described and judged by the oracle with tired eyes."""
    config = _tiny(edit())
    config.selection.per_score = 150
    config.shapes = {
        "count": 600,
        "faults": {"untouched": 0.1, "wrong": 0.2, "careless": 0.5},  # as the editing miniature was taught
        "miss": 0.2,
        "skip": 0.8,
    }
    return config


VARIANTS = {"gen": gen, "edit": edit, "tiny_gen": tiny_gen, "tiny_edit": tiny_edit}


def get_config(variant: str = "") -> ConfigDict:
    """The config of a curation; there is no default, the variant says of what."""
    return choose_variant(VARIANTS, variant)
