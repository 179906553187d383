"""Drawing with Qwen-Image-Edit: six dpm2 steps beside a source image, and the decoding of the latents.

    python -m benchmarks.qwen_edit_rollout --size small

As benchmarks.sd3_rollout, with the source image's latents, encoded before, as further tokens of the transformer.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Case, Options, main
from benchmarks.sd3_rollout import drawing
from benchmarks.sizes import QWEN_EDIT, Diffusion


def cases(options: Options, folder: Path, size: Diffusion | None = None) -> Iterator[Case]:
    yield drawing("Qwen-Image edit rollout", size or QWEN_EDIT[options.size], options, folder)


if __name__ == "__main__":
    main("qwen_edit_rollout", __doc__, cases)
