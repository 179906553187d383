"""Learning with Qwen-Image-Edit: one DiffusionNFT update of a LoRA beside a source image.

    python -m benchmarks.qwen_edit_update --size small

As benchmarks.sd3_update. At full size both sides compute the forward pass again in the backward pass, as the published
training of this model does.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Case, Options, main
from benchmarks.sd3_update import learning
from benchmarks.sizes import QWEN_EDIT, Diffusion


def cases(options: Options, folder: Path, size: Diffusion | None = None) -> Iterator[Case]:
    yield learning("Qwen-Image edit update", size or QWEN_EDIT[options.size], options, folder)


if __name__ == "__main__":
    main("qwen_edit_update", __doc__, cases)
