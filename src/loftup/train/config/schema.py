# ruff: noqa: RUF009  (_values makes a dataclass field)
"""The sections of a training config; every field with its default and its bounds.

Plain dataclasses, which anyone may make and change; the bounds are looked at by :func:`loftup.train.config.check`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

__all__ = [
    "AVERAGING",
    "BackboneConfig",
    "ClassesConfig",
    "DataConfig",
    "Distance",
    "FelzenszwalbConfig",
    "HighResolutionConfig",
    "ImitationConfig",
    "MaskBicubicConfig",
    "ModelConfig",
    "MultiViewConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SegmentsConfig",
    "SelfDistillationConfig",
    "ShiftedConfig",
    "TermConfig",
    "TotalVariationConfig",
    "TrainConfig",
    "ValidationConfig",
]


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _ascending(values: list[float]) -> list[float]:
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError("two numbers [least, greatest]")
    return values


def _values(*values: Any) -> Any:
    """A list as default."""
    return field(default_factory=lambda: list(values))


Integer = Annotated[int, BeforeValidator(_number)]
Whole = Annotated[Integer, Field(ge=0, lt=2**31)]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
Real = Annotated[float, BeforeValidator(_number)]
NotNegative = Annotated[Real, Field(ge=0)]
Positive = Annotated[Real, Field(gt=0)]
AtLeast1 = Annotated[Real, Field(ge=1)]
Share = Annotated[Real, Field(ge=0, le=1)]
ShareBelow1 = Annotated[Real, Field(ge=0, lt=1)]
PositiveShare = Annotated[Real, Field(gt=0, le=1)]
Triple = Annotated[list[Real], Field(min_length=3, max_length=3)]
Counts = Annotated[list[Count], Field(min_length=1)]
Sides = Annotated[list[Count], Field(min_length=2, max_length=2)]  # height and width
Positives = Annotated[list[Positive], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
# A single path may stand alone.
Paths = Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Kind = Literal["auto", "sa1b", "shards", "labels", "images"]
Distance = Literal["affinity", "l2", "cosine"]


# Terms on what the attention averages in place of the features, which the universal network alone can do.
AVERAGING = ("segments", "classes", "imitation")


class Section:
    """Settings of pydantic for every section."""

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


@dataclass
class TermConfig(Section):
    """A term of the objective; its ``weight`` is 0 where it is not wanted."""

    weight: NotNegative = 0.0


@dataclass
class BackboneConfig(Section):
    """The frozen backbone, as :func:`loftup.load_backbone` takes it."""

    name: Text = "dinov2_vits14"
    weights: Text | None = None  # a file
    layer: Integer | None = None  # a stage or block; None takes the last
    mean: Triple | None = None  # of the images that it expects; None takes the model's own
    std: Triple | None = None
    views: Literal[1, 4, 9, 16] = 1  # shifted views of each picture, whose grids make a finer one
    share: Positive = 1.0  # of the steps, in proportion to the other backbones'
    options: dict[str, Any] = field(default_factory=dict)  # for the library that the model is from


@dataclass
class ModelConfig(Section):
    """The upsampler and its first weights."""

    # "loftup" is the published network, for one backbone; "any" the universal one, see loftup.networks.universal. The
    # others are those that LoftUp is compared with, see loftup.train.baselines: they start near interpolation, and
    # nothing below is for them.
    architecture: Literal["loftup", "any", "featup_jbu", "lift", "resize_conv", "liif"] = "loftup"
    pretrained: Text | None = None  # weights to go on from, as LoftUp.from_pretrained takes them; None starts anew
    heads: Count = 4  # of the attention

    # For "loftup" alone; "any" starts as joint bilateral upsampling and has no such parts.
    start: Literal["interpolator", "random"] = "random"  # without pretrained; see loftup.train.objective.start
    position_code: Literal["sine", "learnable"] = "sine"  # with pretrained that of the weights
    lr_size: Count = 16  # side of the learnable table
    blocks: Count = 2  # of cross-attention
    # "frozen": running statistics, calibrated on whole images before a random start.
    batch_norm: Literal["frozen", "batch"] = "batch"

    # For "any" alone.
    radius: Count = 2  # cells that a pixel sees on each side of its own
    code_width: Count = 8  # channels of each head's guidance code
    encoder_width: Annotated[Integer, Field(ge=2)] = 32  # channels inside the network that makes these codes
    # The next two are also for pretrained weights: a part that these lack is added, and begins as nothing; one that
    # they have stays.
    quarter_width: Whole = 0  # channels of its part at a quarter of the resolution, which sees farther; 0: none
    local: bool = False  # a cell's likeness to the cells around it says how far and how surely its pixels look
    # Greatest number of image pixels along a side of an output pixel, whose codes it averages; with pretrained at least
    # theirs.
    oversampling: Count = 1
    # Greatest share of the features' channels left out in a step, which makes backbones with fewer channels of one; at
    # least 8 stay.
    channel_dropout: ShareBelow1 = 0.0
    channel_mixing: Share = 0.0  # probability that a step sees the channels through a random orthogonal map

    @property
    def universal(self) -> bool:
        """Tell whether the upsampler is for any backbone."""
        return self.architecture == "any"

    @property
    def baseline(self) -> bool:
        """Tell whether it is one that LoftUp is compared with."""
        return self.architecture not in ("loftup", "any")


@dataclass
class DataConfig(Section):
    """Pictures, masks and the views made of them."""

    path: Paths = _values()  # folders or shards, one or several
    kind: Kind = "auto"  # "images": masks by Felzenszwalb on the fly
    felzenszwalb: Positives = _values(300.0, 600.0, 1200.0)  # scales of these masks
    felzenszwalb_side: Count = 480  # short side that a picture is reduced to for them
    sizes: Counts = _values(224)  # sides S of the backbone's square input in pixels, one drawn for every step
    ratios: Positives = _values(1.0)  # output size over input size, one drawn for every step
    # Smallest and largest side of the random square crop, as a share of the picture's short side.
    scale: Annotated[list[PositiveShare], AfterValidator(_ascending)] = _values(0.6, 1.0)
    flip: Share = 0.5  # probability of mirroring
    void: Whole | None = None  # label that is no mask, in label maps
    held_out: Whole = 0  # so many pictures, evenly spread, are left out of the training
    # For objective.classes: how many classes the label maps of each of path have, labels 0 to n-1; 0 for masks without.
    classes: list[Whole] = _values()
    guidance_jitter: Share = 0.0  # probability that the image changes its colours for the upsampler alone
    views: Whole = 0  # 0: a new crop every time; K > 0: K fixed crops of every picture, whose features can be cached
    # Folder for features on disk; needs views. It saves the backbone's passes over the student's images and their
    # shifted views, and whom objective.imitation imitates, but no pass over crops and enlarged images; it holds `views`
    # entries of a picture for each of sizes.
    cache: Text | None = None
    workers: Whole = 2  # loader processes


@dataclass
class MaskBicubicConfig(TermConfig):
    """Stage 1 (Eq. 1 and 2): squared distance to bicubic features refined by masks."""

    alpha: Share = 0.8  # of a mask's mean in its pixels
    masks: Count = 150  # at most so many


@dataclass
class SelfDistillationConfig(TermConfig):
    """Stage 2 (Eq. 3): a teacher, the moving average of the student, sees crops of the enlarged image."""

    distance: Distance = "affinity"
    crops: Count = 2  # of every image
    zoom: Annotated[list[AtLeast1], AfterValidator(_ascending)] = _values(2.0, 4.0)  # least and greatest t
    refine: bool = True  # the teacher's output by masks
    alpha: Share = 0.8  # of that
    masks: Count = 150  # at most so many
    border: Annotated[Real, Field(ge=0, lt=0.5)] = 0.1  # share of the crop cut off at each side
    decay: Share = 0.99  # of the moving average
    every: Count = 10  # steps between its updates


@dataclass
class HighResolutionConfig(TermConfig):
    """The backbone's features of the image enlarged k times, as target on their own grid (LiFT: k = 2)."""

    distance: Distance = "l2"
    factors: Counts = _values(2, 3, 4)  # values of k, one drawn for every step
    crop: bool = False  # enlarge the window's surroundings alone, at the backbone's input size


@dataclass
class SegmentsConfig(TermConfig):
    """A probe of every picture's masks, read at low resolution and judged on the output's pixels; for "any" alone."""

    ridge: Positive = 0.3  # of the probe, as a share of the mean squared length of a cell's features
    masks: Count = 32  # at most so many of a picture, drawn at random
    area: Share = 0.5  # a mask's pixels weigh by its area to the power of minus this
    edges: NotNegative = 0.0  # further weight of pixels within two of an outline
    overlap: NotNegative = 0.0  # weight of the masks' soft intersection over union, beside their cross-entropy


@dataclass
class ClassesConfig(TermConfig):
    """Two linear probes of the label maps' classes, judged on the output's pixels; for "any" alone.

    One learns from the cells and asks for the features' own space, one learns from the output.
    """

    rarity: Share = 0.6  # a class weighs by its share of the pixels to the power of minus this
    edges: NotNegative = 4.0  # further weight of pixels within two of an outline
    overlap: NotNegative = 0.5  # weight of the classes' soft intersection over union, beside the cross-entropy


@dataclass
class ShiftedConfig(TermConfig):
    """The backbone's features of shifted views of the image, upsampled, as target at every output pixel."""

    distance: Distance = "l2"
    views: Literal[4, 9, 16] = 9  # passes of the backbone for every picture; data.cache keeps them
    upsampler: Text | None = "any"  # that brings them to the output's size; null: bilinear interpolation


@dataclass
class ImitationConfig(TermConfig):
    """Squared distance to the output of another project's upsampler; for "any" alone.

    What is compared is the standardised features' projection to a few random directions, which keeps distances and
    makes the teacher's outputs small enough for data.cache.
    """

    upsampler: Text | None = None  # "anyup:WEIGHTS@FOLDER" or "jafar:WEIGHTS@FOLDER", with the folder of its code
    trust_code: bool = False  # run that code
    ratio: Positive = 0.5  # of the teacher's output size to the backbone's input size
    channels: Count = 64  # of the projection
    backbones: list[Whole] = _values()  # numbers of those in whose steps it counts; empty for all


@dataclass
class MultiViewConfig(TermConfig):
    """FeatUp's consistency: downsampled dense features of a moved view equal the backbone's features of that view."""

    views: Count = 2  # random affine views a step
    zoom: AtLeast1 = 1.6  # greatest magnification
    shift: Share = 0.2  # greatest one, as a share of the side
    flip: Share = 0.5  # probability of mirroring


@dataclass
class TotalVariationConfig(TermConfig):
    """Mean absolute difference of neighbouring output pixels."""


@dataclass
class ObjectiveConfig(Section):
    """Weighted sum of the terms whose weight is not 0."""

    mask_bicubic: MaskBicubicConfig = field(default_factory=MaskBicubicConfig)
    self_distillation: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)
    high_resolution: HighResolutionConfig = field(default_factory=HighResolutionConfig)
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    shifted: ShiftedConfig = field(default_factory=ShiftedConfig)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    multi_view: MultiViewConfig = field(default_factory=MultiViewConfig)
    total_variation: TotalVariationConfig = field(default_factory=TotalVariationConfig)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term."""
        return {name: term.weight for name, term in vars(self).items()}


@dataclass
class OptimizerConfig(Section):
    """AdamW and its schedule."""

    rate: Positive = 1e-4  # the highest
    schedule: Literal["cosine", "constant"] = "constant"  # after the warm-up
    warmup: Whole = 0  # steps of linear warm-up
    final: Share = 0.02  # last rate of the cosine as a share of the highest
    weight_decay: NotNegative = 0.01  # and the two rates of its moving averages
    betas: Annotated[list[ShareBelow1], Field(min_length=2, max_length=2)] = _values(0.9, 0.999)
    clip: Positive | None = 1.0  # greatest norm of the gradient; None leaves it


@dataclass
class ValidationConfig(Section):
    """Measurements and drawings on validation pictures.

    checkpoints/best.pt is the student of the lowest loss of stage 1 on them; where there is a probe, of its highest
    mIoU.
    """

    path: Paths = _values()  # folder or shards; empty validates nothing
    kind: Kind = "auto"
    images: Count = 50  # at most so many, evenly spread
    size: Count = 224  # side of the centre crop in pixels
    every: Count = 500  # steps between validations
    pictures: Whole = 4  # in the PCA grid
    # Folder of NAME.jpg and NAME.png label maps to train a quick linear probe on, to judge by.
    probe: Text | None = None
    probe_classes: Whole = 0  # labels 0 .. n-1 count, others do not


@dataclass
class FelzenszwalbConfig(Section):
    """Options of ``loftup masks``, see :class:`loftup.train.masks.makers.FelzenszwalbMaker`."""

    scales: Positives = _values(300.0, 600.0, 1200.0)  # the larger, the larger the segments
    sigma: Annotated[NotNegative, Field(le=100)] = 0.8  # smoothing, in pixels
    min_size: Count = 100  # pixels of a segment
    side: Count = 480  # short side that a picture is reduced to


@dataclass
class TrainConfig(Section):
    """A training run."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    # In place of the single one, for model.architecture=any: one is drawn for every step, and the probe of the
    # validation takes the first.
    backbones: list[BackboneConfig] = _values()
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: Text = "runs/loftup"  # folder of the run: checkpoints, logs, pictures, and at the end the weights
    steps: Count = 1000  # of the optimizer
    batch: Count = 8  # images a step in each process and micro-batch
    accumulate: Count = 1  # micro-batches a step
    # Side of the random window of output pixels that the loss sees, rounded to feature cells; None for all. It is for
    # the terms on the whole output: self-distillation computes its crops alone, whatever the window.
    window: Count | None = None
    precision: Literal["float32", "bfloat16"] = "float32"  # the latter by autocast
    compile: bool = False  # the network, by torch.compile; of "any" the part that looks at images
    checkpointing: bool = False  # compute activations twice to save memory
    # The attention of "any" in a Triton kernel, on CUDA, and once more in PyTorch in the backward pass.
    triton: bool = False
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0  # of everything random
    save_every: Count = 500  # steps between checkpoints
    keep: Count = 2  # checkpoints, beside the best
    log_every: Count = 10  # steps between lines of the log
    hub: Text | None = None  # repository to push the weights to at the end

    @property
    def sections(self) -> dict[str, BackboneConfig]:
        """All backbones by the names that messages call them: "backbones[0]" and so on, or the single "backbone"."""
        return {f"backbones[{index}]": each for index, each in enumerate(self.backbones)} or {"backbone": self.backbone}
