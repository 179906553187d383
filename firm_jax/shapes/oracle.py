"""Ground truth from pixels: which shapes a picture shows, which requirements hold, how well it is made.

The oracle never sees the scene a picture was drawn from. It separates the foreground from the flat background,
splits it into connected components, and accepts a component as a shape only when one palette colour fills it and
one of the four outlines fits it closely; everything else that is large enough to be seen is a stray.
"""

import dataclasses

import numpy as np

from firm_jax.errors import DataError
from firm_jax.shapes.render import signed_distance
from firm_jax.shapes.scene import BACKGROUNDS, COLORS, KINDS, SIZES, Prompt, Scene, Shape

_COLOR_NAMES = tuple(COLORS)
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)

# Lengths and areas are in the pixels of a 64-pixel image; colour distances are Euclidean in RGB.
_FOREGROUND = 0.2  # colour distance from the background at which a pixel belongs to something
_COLOR_TOLERANCE = 0.32  # farthest a shape's colour may lie from its palette colour
_BACKGROUND_TOLERANCE = 0.25
_OFF_LINE = 0.25  # colour distance from the mixtures of background and shape at which a pixel is of neither
_PURITY = 0.9  # share of a shape's pixels that must be of such a mixture
# Intersection over union with the ideal outline, below which a component is malformed: the longer an outline for
# its area, the more a slight deviation costs.
_FIT = {"circle": 0.88, "square": 0.85, "triangle": 0.78, "cross": 0.77}
_MIN_AREA = 12.0  # smaller specks are noise
_RADII = (5.0, 15.0)  # what may pass as a small or a large shape
_SIZE_BORDER = 64 * float(np.sqrt(SIZES["small"] * SIZES["large"]))


def _unit_geometry(kind: str) -> tuple[float, float]:
    """Area of a shape of half extent 1, and the height of its centroid over its middle (y down)."""
    grid = (np.arange(400) + 0.5) / 200 - 1
    inside = signed_distance(kind, grid, grid[:, None], 1.0) < 0
    return float(inside.mean() * 4), float((inside * grid[:, None]).sum() / inside.sum())


_GEOMETRY = {kind: _unit_geometry(kind) for kind in KINDS}


@dataclasses.dataclass(frozen=True)
class Component:
    """One connected piece of foreground, as measured; kind and color are of the nearest shape.

    x, y (middle) are fractions of the image side; radius is the half extent in pixels of a 64-pixel image.
    fit is the intersection over union with the ideal outline, purity the share of pixels that have the colour or
    mix it with the background, color_error the distance to the palette colour, softness the width of the edges in
    pixels of this image.
    """

    kind: str
    color: str
    x: float
    y: float
    radius: float
    fit: float
    purity: float
    color_error: float
    softness: float

    @property
    def is_shape(self) -> bool:
        """Whether it is good enough to count as a shape; a stray otherwise."""
        return (
            self.fit >= _FIT[self.kind]
            and self.purity >= _PURITY
            and self.color_error <= _COLOR_TOLERANCE
            and _RADII[0] <= self.radius <= _RADII[1]
        )

    @property
    def size(self) -> str:
        """The nearer size class."""
        return "large" if self.radius > _SIZE_BORDER else "small"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the oracle sees: a background (None if of no known colour), its distance to the palette colour, the
    standard deviation of the pixel noise, and the components in reading order."""

    background: str | None
    background_error: float
    noise: float
    components: tuple[Component, ...]

    @property
    def scene(self) -> Scene:
        """The well-formed shapes alone."""
        return Scene(
            self.background,
            tuple(Shape(c.kind, c.color, c.size, c.x, c.y) for c in self.components if c.is_shape),
        )

    @property
    def strays(self) -> int:
        """The number of malformed components."""
        return sum(not component.is_shape for component in self.components)


def inspect(image: np.ndarray) -> Reading:
    """Measure a float image [H, W, 3] in [0, 1], H = W >= 48. Raises DataError for anything else."""
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.shape[0] < 48:
        raise DataError(f"the oracle reads square RGB images [H, W, 3] of 48 pixels or more, not {image.shape}")
    if not (np.isfinite(image).all() and image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
        raise DataError("the oracle reads finite pixels in [0, 1]; divide 8-bit images by 255")
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    error = np.linalg.norm(_BACKGROUND_VALUES - ground, axis=1)
    known = error.min() <= _BACKGROUND_TOLERANCE
    background = _BACKGROUND_NAMES[int(error.argmin())] if known else None
    mask = ((image - ground) ** 2).sum(-1) > _FOREGROUND**2
    labels, count = label(mask)
    components = _measure(image, ground, labels, count)
    components.sort(key=reading_order)
    # Most neighbouring pixels differ by noise alone, so the median difference measures it.
    noise = float(np.median(np.abs(np.diff(image, axis=1))) / (0.6745 * np.sqrt(2)))
    return Reading(background, float(error.min()), noise, tuple(components))


def ideal(scene: Scene) -> Reading:
    """What would be seen of a scene that is drawn without a flaw."""
    components = [
        Component(shape.kind, shape.color, shape.x, shape.y, 64 * SIZES[shape.size], 1.0, 1.0, 0.0, 1.0)
        for shape in scene.shapes
    ]
    return Reading(scene.background, 0.0, 0.0, tuple(sorted(components, key=reading_order)))


def reading_order(component: Component) -> tuple[bool, float]:
    return component.y > 0.5, component.x


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected components (4-neighbours) of a boolean mask [H, W]: int labels [H, W] from 1, and their number.

    Union-find over the runs of each row: a picture has few runs, however many pixels.
    """
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, end = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if begin[above] < end[here] and begin[here] < end[above]:
                parent[root(above)] = root(here)
            if end[above] < end[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(rows))], int)
    names, number = np.unique(roots, return_inverse=True)
    # A run adds its label where it starts and takes it away where it ends; the running sum paints it.
    paint = np.zeros((height, width + 1), int)
    np.add.at(paint, (rows, starts), number + 1)
    np.add.at(paint, (rows, ends), -(number + 1))
    return paint.cumsum(1)[:, :width], len(names)


def _measure(image, ground, labels, count) -> list[Component]:
    """Every component that is large enough to be seen."""
    if count == 0:
        return []
    scale = image.shape[0] / 64
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [
        _measure_one(image, ground, labels, number, scale)
        for number in range(1, count + 1)
        if areas[number] >= _MIN_AREA * scale**2
    ]


def _measure_one(image, ground, labels, number, scale) -> Component:
    own = labels == number
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    window = (
        slice(max(rows[0] - 2, 0), rows[-1] + 3),
        slice(max(columns[0] - 2, 0), columns[-1] + 3),
    )
    pixels, own, around = image[window], own[window], labels[window]

    # Along an edge colours mix with the background; the pixels farthest from it are the pure ones.
    contrast = ((pixels - ground) ** 2).sum(-1)
    pure = pixels[own & (contrast >= 0.7 * np.quantile(contrast[own], 0.9))]
    nearest = ((pure[:, None] - _COLOR_VALUES) ** 2).sum(-1).argmin(1)
    winner = int(np.bincount(nearest, minlength=len(_COLOR_NAMES)).argmax())
    color = np.median(pure[nearest == winner], axis=0)

    # Coverage of each pixel on the line from background to shape colour, neighbours left out; what lies far from
    # that line is a second colour.
    axis = color - ground
    share = ((pixels - ground) * axis).sum(-1) / max(float((axis * axis).sum()), 1e-6)
    coverage = np.where(own | ((around == 0) & (share >= 0.1)), np.clip(share, 0, 1), 0)
    off_line = ((pixels - ground - np.clip(share, 0, 1.2)[..., None] * axis) ** 2).sum(-1) > _OFF_LINE**2
    kind, x, y, radius, fit = _fit_outline(coverage, window, scale)
    side = image.shape[0]
    return Component(
        kind,
        _COLOR_NAMES[winner],
        x / side,
        y / side,
        radius / scale,
        fit,
        float(1 - off_line[own].mean()),
        float(np.linalg.norm(color - _COLOR_VALUES[winner])),
        _softness(coverage),
    )


def _softness(coverage: np.ndarray) -> float:
    """Width of the edges of a coverage map: by the coarea formula its total variation is the outline's length,
    however blurred, and 4c(1 - c) integrates to about 0.7 across a crisp edge, to 2.3 sigma across a blurred one.
    """
    padded = np.pad(coverage, 1)
    length = np.hypot(np.diff(padded, axis=0)[:, :-1], np.diff(padded, axis=1)[:-1]).sum()
    return float(4 * (coverage * (1 - coverage)).sum() / max(float(length), 1e-6))


def _fit_outline(coverage, window, scale) -> tuple[str, float, float, float, float]:
    """The best of the four outlines with the area and centroid of the coverage: kind, x, y, radius, fit."""
    height, width = coverage.shape
    grid_y = np.arange(height, dtype=np.float32)[:, None] + window[0].start + 0.5
    grid_x = np.arange(width, dtype=np.float32) + window[1].start + 0.5
    area = max(float(coverage.sum()), 1e-6)
    x = float((coverage * grid_x).sum() / area)
    y = float((coverage * grid_y).sum() / area)
    # Steepening the edges compares outlines, not how sharp they are.
    solid = np.clip(2 * coverage - 0.5, 0, 1)
    best = (KINDS[0], x, y, 0.0, -1.0)
    for kind in KINDS:
        unit_area, unit_height = _GEOMETRY[kind]
        radius = float(np.sqrt(area / unit_area))
        middle = y - unit_height * radius
        distance = signed_distance(kind, grid_x - x, grid_y - middle, radius)
        ideal = np.clip(0.5 - 2 * distance, 0, 1)
        fit = float(np.minimum(solid, ideal).sum() / max(float(np.maximum(solid, ideal).sum()), 1e-6))
        if fit > best[4]:
            best = (kind, x, middle, radius, fit)
    return best


def read(image: np.ndarray) -> Scene:
    """The scene that the pixels show: well-formed shapes only."""
    return inspect(image).scene


def check(image: np.ndarray, prompt: Prompt) -> tuple[bool, ...]:
    """Which of the prompt's requirements hold in the picture, in their order."""
    return check_reading(inspect(image), prompt)


def check_reading(reading: Reading, prompt: Prompt) -> tuple[bool, ...]:
    """`check` for a picture that has been read already."""
    return tuple(requirement.holds(reading.scene, reading.strays) for requirement in prompt.requirements)


def fraction(image: np.ndarray, prompt: Prompt) -> float:
    """Share of the requirements that hold."""
    return float(np.mean(check(image, prompt)))


def accuracy(image: np.ndarray, prompt: Prompt) -> float:
    """1.0 when all requirements hold, else 0.0."""
    return float(all(check(image, prompt)))


def alignment_score(image: np.ndarray, prompt: Prompt) -> int:
    """1 to 5, rising with the share of requirements that hold: 5 for all, 1 for next to none."""
    return share_to_score(fraction(image, prompt))


def share_to_score(share: float) -> int:
    """5: all; 4: one slip (3 of 4 or better); 3: about half; 2: a fifth or better; 1: less."""
    return 1 + sum(share >= border - 1e-6 for border in (0.2, 0.45, 0.7, 1.0))


def quality_scores(image: np.ndarray) -> tuple[int, int, int]:
    """(aesthetics, technical, structure), each 1 to 5, whatever the prompt was."""
    return reading_quality(inspect(image))


def reading_quality(reading: Reading) -> tuple[int, int, int]:
    """`quality_scores` for a picture that has been read already.

    aesthetics: clear palette colours and no stray pieces; technical: no noise, sharp edges; structure: how well the
    pieces match the ideal outlines. A picture without anything on it has none of them.
    """
    pieces = reading.components
    if not pieces:
        return 1, 1, 1
    off_palette = max(reading.background_error, float(np.mean([piece.color_error for piece in pieces])))
    faded = sum(off_palette > border for border in (0.12, 0.24, 0.36))
    littered = sum(reading.strays / len(pieces) > border for border in (0.0, 0.34, 0.67))
    noisy = sum(reading.noise > border for border in (0.02, 0.05, 0.09, 0.14))
    softness = float(np.mean([piece.softness for piece in pieces]))
    blurred = sum(softness > border for border in (2.6, 3.6, 4.8, 6.0))
    fit = float(np.mean([piece.fit if piece.purity >= _PURITY else 0.5 * piece.fit for piece in pieces]))
    crooked = sum(fit < border for border in (0.92, 0.86, 0.78, 0.68))
    return max(1, 5 - faded - littered), 5 - max(noisy, blurred), 5 - crooked
