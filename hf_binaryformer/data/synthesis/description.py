"""What the engine draws: structures, tissues and ranges, read from a YAML file beside this module."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from hf_binaryformer.pipelines.sides import SIDES

DESCRIPTIONS = Path(__file__).parent
CONTRAST_RANDOM = "random"
Range = tuple[float, float]


@dataclass(frozen=True)
class Ranges:
    """What is drawn for a volume. (low, high) pairs are uniform draws; intensities are fractions of full scale.

    Args:
        rotation_degrees, scale, shear: largest change about or along each axis.
        elastic: smooth displacements that are added: control points from … to … mm apart, standard deviation up to … mm.
        mirror_probability: of left and right exchanged, image and labels.
        contrasts: probability of each contrast: the keys of the tissues' means, and "random".
        random_by_tissue: share of the random contrasts in which the structures of a tissue share a mean.
        mean_jitter: standard deviation of a structure's mean around its tissue's.
        tissue_std: spread inside a structure.
        texture_share: share of that spread that is smooth over ``texture_mm``; the rest is white noise.
        texture_mm: control points of the texture.
        agent_probability, agent_mean: of a contrast agent in vessels and membranes, and their intensity.
        vessel_spacing, vessel_radius: control points and radius, mm, of vessels drawn at random.
        lesion_probability, lesion_count, lesion_radius, lesion_mean: blobs in the described structures, mm.
        whole_probability: of the surroundings being kept, against stripping.
        strips: by name: ``probability``, ``margin`` (mm outside the core), ``wobble`` (mm) over ``spacing`` (mm).
        margin: field of view around the core or, in whole volumes, the body, mm.
        below: mm of the body below the core that stay in view.
        cuts: by name: ``probability``, ``axis``, ``side`` ("low", "high"; "slab" keeps so many mm), ``mm``.
        resolutions: by name: ``probability``, ``plane`` and ``slice`` mm; a slice axis of 0, 1 or 2 (null: any).
        slice_profile: width of a slice as a share of the distance of slices.
        blur: of the scanner, standard deviation in voxels.
        fine: finest and coarsest spacing, mm, that the anatomy is drawn at before it is averaged.
        oversampling: voxels are averaged from so many finer ones along each axis, within ``fine``.
        ringing_probability, ringing_kept: share of frequencies kept along one axis.
        motion_probability, motion_voxels, motion_copies: shifted copies along one axis.
        bias_log, bias_mm: amplitude of the logarithm of the coil's shading, and its control points.
        noise: Rician standard deviation.
        log_gamma: largest logarithm of the power.
        keep_grid: write volumes at the scan's own resolution; otherwise interpolated to the description's ``grid_mm``.
        window, window_probability: the scan is clipped to intensities from … to …, each drawn from a range, as CT is
            shown; None: never.
    """

    rotation_degrees: float
    scale: float
    shear: float
    elastic: list[tuple[float, float, float]]
    mirror_probability: float
    contrasts: dict[str, float]
    random_by_tissue: float
    mean_jitter: float
    tissue_std: Range
    texture_share: Range
    texture_mm: Range
    agent_probability: float
    agent_mean: Range
    vessel_spacing: Range
    vessel_radius: Range
    lesion_probability: float
    lesion_count: tuple[int, int]
    lesion_radius: Range
    lesion_mean: Range
    whole_probability: float
    strips: dict[str, dict[str, Any]]
    margin: Range
    below: Range
    cuts: dict[str, dict[str, Any]]
    resolutions: dict[str, dict[str, Any]]
    slice_profile: Range
    blur: Range
    fine: Range
    oversampling: float
    ringing_probability: float
    ringing_kept: Range
    motion_probability: float
    motion_voxels: Range
    motion_copies: int
    bias_log: Range
    bias_mm: Range
    noise: Range
    log_gamma: float
    keep_grid: bool
    window: tuple[Range, Range] | None = None
    window_probability: float = 1.0


@dataclass(frozen=True)
class Region:
    """Values of the label map that share one tissue; ``labels`` has the label of each value, 0 for none."""

    name: str
    values: tuple[int, ...]
    labels: tuple[int, ...]
    tissue: dict[str, float]
    core: bool


@dataclass(frozen=True, eq=False)
class Description:
    """The content of one YAML file.

    Args:
        source, licence: for the manifest.
        files: name of the label map of an anatomy, with ``{number}``.
        case: first word of the cases' names.
        tissues: mean of each tissue by contrast, (low, high). With a key "random" these are its means in random contrasts
            too, for example of air; otherwise any.
        structures: by name: ``left`` and ``right``, or ``middle``: values of the label map, the first of which is the
            label that is written; ``tissue``: shares of tissues. ``core: false`` is left out of the stripped organ.
        parts: values with a tissue of their own that carry another structure's label: ``values``, ``labels``, ``tissue``;
            ``core`` as above.
        surroundings: tissue -> values without a label.
        agents: ``tissues`` that a contrast agent brightens; ``membrane``: voxels of ``of`` within ``mm`` of ``beside``;
            ``vessels_in``: values in which vessels are drawn.
        lesions_in: names of structures that lesions start in.
        ranges: of the training volumes.
        evaluation: ``ranges`` that differ in validation and test volumes, and ``sets``, by name, that differ further.
        splits: numbers of the anatomies of each split, unless the command says others.
        resample_mm: spacing that label maps are brought to when they are read; None: they have 1 mm.
        grid_mm: spacing of the volumes along R, A, S; None: the scan's own.
        by_contrast: ranges that differ in volumes of a contrast.
        signed: contrasts in which tissues of negative means cancel positive ones, and the scanner gives the magnitude.
        body: for maps of organs alone: ranges of the body that is drawn around them
            (:class:`~hf_binaryformer.data.synthesis.canvas.BodyRanges`).
    """

    source: str
    licence: str
    files: str
    case: str
    tissues: dict[str, dict[str, Range]]
    structures: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    surroundings: dict[str, list[int]]
    agents: dict[str, Any]
    lesions_in: list[str]
    ranges: dict[str, Any]
    evaluation: dict[str, Any]
    splits: dict[str, str] = field(default_factory=lambda: {"train": "1-16", "validation": "17-18", "test": "19-20"})
    resample_mm: float | None = None
    grid_mm: tuple[float | None, ...] = (1.0, 1.0, 1.0)
    by_contrast: dict[str, dict[str, Any]] = field(default_factory=dict)
    signed: list[str] = field(default_factory=list)
    body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        names = {*self.train_ranges.contrasts} | {key for means in self.tissues.values() for key in means}
        for name, means in self.tissues.items():
            if lacking := names - {*means, CONTRAST_RANDOM}:
                raise ValueError(f"tissue '{name}' has no mean for {sorted(lacking)}")
        values = [value for region in self.regions for value in region.values]
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"values {doubled} stand in two regions, expected one for each")
        for region in self.regions:
            if unknown := set(region.tissue) - set(self.tissues):
                raise ValueError(f"'{region.name}' has the tissue {sorted(unknown)}; there are {sorted(self.tissues)}")
            if unnamed := set(region.labels) - {0, *self.label_names}:
                raise ValueError(f"'{region.name}' has the labels {sorted(unnamed)}, which no structure has")
        for name in self.evaluation["sets"]:
            self.set_ranges(name)
        for contrast in self.by_contrast:
            if contrast not in names:
                raise ValueError(f"by_contrast has '{contrast}', which no tissue has; expected one of {sorted(names)}")
            self.contrast_ranges(self.train_ranges, contrast)

    @cached_property
    def regions(self) -> list[Region]:
        """All regions: structures, parts of structures, surroundings."""
        found = []
        for name, one in self.structures.items():
            groups = [one[key] for key in (*SIDES, "middle") if key in one]
            labels = [group[0] for group in groups for _ in group]
            found.append(Region(name, tuple(sum(groups, [])), tuple(labels), one["tissue"], one.get("core", True)))
        for name, one in self.parts.items():
            found.append(Region(name, tuple(one["values"]), tuple(one["labels"]), one["tissue"], one.get("core", True)))
        for tissue, values in self.surroundings.items():
            found.append(Region(tissue, tuple(values), (0,) * len(values), {tissue: 1.0}, False))
        return found

    @cached_property
    def label_names(self) -> dict[int, str]:
        """Label -> name, sorted; 0 is the background."""
        names = {0: "background"}
        for name, one in self.structures.items():
            names |= {one[side][0]: f"{side} {name}" for side in SIDES if side in one}
            if "middle" in one:
                names[one["middle"][0]] = name
        return dict(sorted(names.items()))

    @cached_property
    def train_ranges(self) -> Ranges:
        """Ranges of training volumes."""
        return _ranges(self.ranges)

    def set_ranges(self, name: str) -> Ranges:
        """Ranges of the evaluation set ``name``."""
        return _ranges({**self.ranges, **self.evaluation["ranges"], **(self.evaluation["sets"][name] or {})})

    def contrast_ranges(self, ranges: Ranges, contrast: str) -> Ranges:
        """Ranges of a volume of this contrast."""
        return dataclasses.replace(ranges, **_tuples(self.by_contrast.get(contrast, {})))

    def value_of(self, name: str, label: int = 0) -> int:
        """The value of the label map by which the region ``name`` is drawn with this label."""
        region = next(region for region in self.regions if region.name == name)
        return region.values[region.labels.index(label)]


def _ranges(content: dict[str, Any]) -> Ranges:
    check_keys(Ranges, content, "ranges lack", "and have unknown")
    return Ranges(**_tuples(content))


def check_keys(kind: type, content: object, lacks: str, has: str) -> None:
    """Whether a mapping has the fields of a dataclass, all that have no default and no others.

    Raises:
        ValueError: it does not; ``lacks`` and ``has`` are the words before the names.
    """
    fields = dataclasses.fields(kind)
    known = {field.name for field in fields}
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    given = set(content) if isinstance(content, dict) else set()
    if not needed <= given <= known:
        raise ValueError(f"{lacks} {sorted(needed - given)} {has} {sorted(given - known)}")


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) and key != "elastic" else v for key, v in content.items()}


@lru_cache
def load_description(path: Path) -> Description:
    """Read a YAML file.

    A file with ``like: brain-sides`` takes from that description of the project what it does not have itself: whole keys,
    and in the sections that it has in part, such as ``ranges``, the settings that it leaves out.

    Raises:
        ValueError: the file is missing, keys are missing or unknown, or values contradict each other.
    """
    content = _read(path)
    if isinstance(content, dict) and "like" in content:
        base = _read(DESCRIPTIONS / f"{content.pop('like')}.yaml")
        both = {key for key in base.keys() & content if isinstance(base[key], dict) and isinstance(content[key], dict)}
        content = base | content | {key: base[key] | content[key] for key in both}
    check_keys(Description, content, f"{path} lacks", "and has the unknown keys")
    try:
        return Description(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in DESCRIPTIONS.glob("*.yaml")))
        raise ValueError(f"{path} does not exist; those of the project are {shipped}, in {DESCRIPTIONS}")
    return yaml.safe_load(path.read_text())
