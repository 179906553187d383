"""Every released size of Qwen3-VL: our names and shapes against those of PyTorch's model, nothing allocated."""

import jax
import pytest
import transformers
from flax import nnx

from firm_jax.interop.load import account
from firm_jax.interop.mapping import SAME_NAMES, tensors
from firm_jax.models import abstract
from firm_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig
from firm_jax.published import QWEN3_VL

torch = pytest.importorskip("torch")

MILLIONS = {"2B": 2128, "4B": 4438, "8B": 8767, "32B": 33357}  # parameters as counted in PyTorch


def torch_shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as PyTorch saves them: a tied head is not saved."""
    config = transformers.Qwen3VLConfig.from_dict(raw)
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", QWEN3_VL)
def test_names_and_shapes(size):
    raw = dict(QWEN3_VL[size])
    config = Qwen3VLConfig.from_hf(raw)
    params = nnx.state(abstract(Qwen3VL, config), nnx.Param)
    needed = {t.name: t.shape for t in tensors(params, (*Qwen3VL.weight_rules(config), *SAME_NAMES))}
    present = torch_shapes(raw)
    account(needed, present, f"Qwen3-VL {size}")
    assert len(needed) == len(present)
    millions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert round(millions) == MILLIONS[size]
    assert transformers.Qwen3VLConfig.from_dict(config.to_hf()).text_config.rope_parameters["rope_theta"] == 5e6
