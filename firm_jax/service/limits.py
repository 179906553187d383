"""What one request, and all of them together, may ask for."""

from dataclasses import dataclass

# Of the protocol: they stand in its schema.
ITEMS = 64
IMAGES = 8
TEXT_CHARACTERS = 65_536
LIKELY = 20  # most alternatives to a token that are told


@dataclass(frozen=True)
class Limits:
    """Defaults of `firm-jax serve`.

    body_bytes: of a request. bodies_bytes: of all requests that are being read or answered. pixels: of an image.
    request_pixels: of all distinct images of a request. prompt_tokens, new_tokens: of one question and its answer.
    queue: questions that are waiting or being answered. queue_bytes: of their images, as the vision tower takes them.
    deadline_seconds: that a request may take in all. body_seconds: in which it must have arrived. drain_seconds: that
    accepted requests have after SIGTERM. remembered: answers that a repeated question gets again.
    """

    body_bytes: int = 64 << 20
    bodies_bytes: int = 512 << 20
    pixels: int = 4_194_304
    request_pixels: int = 67_108_864
    prompt_tokens: int = 8192
    new_tokens: int = 512
    queue: int = 256
    queue_bytes: int = 4 << 30
    deadline_seconds: float = 600.0
    body_seconds: float = 60.0
    drain_seconds: float = 600.0
    remembered: int = 4096
