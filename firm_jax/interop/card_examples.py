"""The Python in a model card that loads the export, to be run in the card's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firm_jax.embedded import PREFIX
from firm_jax.interop.model_card import is_hub_id
from firm_jax.interop.pipeline_folder import present_parts

SD3 = "StableDiffusion3Pipeline"
PROMPT, INSTRUCTION = "a red circle above a blue square", "make the circle blue"


def pipeline_example(format: str, config: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    """How the pipeline is loaded with an export, and draws as the run's evaluation does.

    config: the run's. index: the model_index.json of its base.
    """
    pipeline, network = index["_class_name"], index["transformer"][1]
    edits, base = "Edit" in pipeline, _name(config["model"])
    if format == "comfyui-lora":  # which only ComfyUI and this package read
        imports = ["from PIL import Image", "", "from firm_jax import Generator"]
        return _example(imports, [], _ours(config, base, edits))
    precision = [] if config["dtype"] == "float32" else [f"torch_dtype=torch.{config['dtype']}"]
    given = list(precision)
    if pipeline == SD3 and "text_encoder_3" not in present_parts(index):
        given += ["text_encoder_3=None", "tokenizer_3=None"]
    imports = [*(["import torch"] if precision else []), f"from diffusers import {pipeline}"]
    if format != "diffusers":
        base = f'resolve("{base}")' if base.startswith(PREFIX) else f'"{base}"'
    if format == "diffusers":
        load = [_opened("pipe", pipeline, '"."', *given)]
    elif format == "diffusers-lora":
        load = [_opened("pipe", pipeline, base, *given), 'pipe.load_lora_weights(".")']
    else:
        imports[-1:] = [f"from diffusers import {', '.join(sorted([pipeline, network]))}", "from peft import PeftModel"]
        load = [
            _opened("transformer", network, base, 'subfolder="transformer"', *precision),
            'transformer = PeftModel.from_pretrained(transformer, ".").merge_and_unload()',
            _opened("pipe", pipeline, base, "transformer=transformer", *given),
        ]
    if edits:
        imports.append("from PIL import Image")
    if "resolve(" in load[0]:
        imports.append("from firm_jax.interop.hub import resolve")
    return _example(imports, load, _draw(pipeline, config["eval"], edits))


def critic_example(criterion: str) -> str:
    """How a critic's folder is opened by transformers, and how it judges here."""
    images = "[picture, picture]" if criterion.startswith("edit_") else "[picture]"
    return _example(
        [
            "from PIL import Image",
            "from transformers import Qwen3VLForConditionalGeneration",
            "",
            "from firm_jax import Critic",
        ],
        ['model = Qwen3VLForConditionalGeneration.from_pretrained(".")'],
        [
            'critic = Critic.from_pretrained(".")',
            'picture = Image.new("RGB", (64, 64), "red")',
            f'request = {{"images": {images}, "prompt": "a red picture", "criterion": "{criterion}"}}',
            "print(critic.judge([request])[0])",
        ],
    )


def critic_lora_example(base: str) -> str:
    """How PEFT puts a critic's LoRA onto the model that it was trained on: a folder, Hub id or `embedded:` name."""
    imports = ["from peft import PeftModel", "from transformers import Qwen3VLForConditionalGeneration"]
    base, of = _name(base), f'"{_name(base)}"'
    if base.startswith(PREFIX):
        imports += ["", "from firm_jax.interop.hub import resolve"]
        of = f'resolve("{base}")'
    load = [f"model = Qwen3VLForConditionalGeneration.from_pretrained({of})"]
    return _example(imports, load, ['model = PeftModel.from_pretrained(model, ".")'])


def _opened(name: str, kind: str, *given: str) -> str:
    return f"{name} = {kind}.from_pretrained({', '.join(given)})"


def _example(imports: list[str], load: list[str], use: list[str]) -> str:
    return "\n".join([*imports, "", *load, *use])


def _name(model: str) -> str:
    """What the base model is called wherever the example is run on this machine."""
    if model.startswith(PREFIX) or is_hub_id(model):
        return model
    return str(Path(model).expanduser().absolute())


def _draw(pipeline: str, settings: Mapping[str, Any], edits: bool) -> list[str]:
    """The lines that draw one image with the settings of an evaluation."""
    given = {
        "prompt": INSTRUCTION if edits else PROMPT,
        "height": settings["height"],
        "width": settings["width"],
        "num_inference_steps": settings["steps"],
    }
    if pipeline == SD3:
        given |= {"guidance_scale": settings["guidance"], "max_sequence_length": settings["max_text_tokens"]}
    elif settings["guidance"] > 1:
        given |= {"true_cfg_scale": settings["guidance"], "negative_prompt": " "}
    source = ['source = Image.open("source.png").convert("RGB")'] if edits else []
    call = f"image = pipe({'image=source, ' if edits else ''}{_said(given)}).images[0]"
    return [*source, call, 'image.save("example.png")']


def _ours(config: Mapping[str, Any], base: str, edits: bool) -> list[str]:
    settings = {name: config["eval"][name] for name in ("steps", "guidance", "height", "width", "max_text_tokens")}
    sources = '[Image.open("source.png")], ' if edits else ""
    return [
        f'generator = Generator.from_pretrained("{base}", dtype="{config["dtype"]}", lora=".")',
        f'images = generator.sample(["{INSTRUCTION if edits else PROMPT}"], {sources}{_said(settings)})',
        'Image.fromarray((images[0] * 255).round().astype("uint8")).save("example.png")',
    ]


def _said(given: Mapping[str, Any]) -> str:
    return ", ".join(
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in given.items()
    )
