"""What targets speak of: what is asked of a site, where quantizers stand, how they are written down, what is wrong."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from onnxcomp.graph.edit import Node
from onnxcomp.graph.sites import Site
from onnxcomp.numerics.affine import Scheme


@dataclass(frozen=True)
class Settings:
    """What the recipe asks of one site."""

    weight_bits: int
    activation_bits: int
    activations: str
    """`auto`, `static`, `dynamic`, `token` or `float`."""
    ranges: str
    percentile: float
    symmetric: bool
    rounding: str = "nearest"
    """How weights are rounded: `nearest` or `gptq`."""
    block: int = 0
    """How many inputs of an output channel share a scale; 0: all. Of a table, how many numbers of a row."""
    zero_points: bool = False
    """Every block has a zero point."""
    mixed: bool | None = None
    """Whether the channels of its input are mixed; None: where it is worth it."""
    methods: tuple[str, ...] | None = None
    """The methods on layers that may be kept; None: all."""


@dataclass(frozen=True)
class Point:
    """One activation quantizer: on `tensor`, for the named consumers, or for everyone where `consumers` is None."""

    tensor: str
    scheme: Scheme
    granularity: str
    """`static`, `dynamic` (per tensor at run time), `token` (last axis, at run time), or `auto`: static or token."""
    ranges: str
    percentile: float
    consumers: tuple[str, ...] | None = None
    highest: float = float("inf")
    """The upper bound of the Clip in front, which the codes must not exceed if they are to replace it."""
    divides: float | None = None
    """A value that is a whole number of steps, and that many lie below zero at least."""
    same_as: str | None = None
    """A tensor quantized earlier whose scale and zero point this one shares, because its values are the same."""


@dataclass(frozen=True)
class Plan:
    """What will be quantized: the sites in graph order, joins included, and the points each tensor gets."""

    sites: tuple[Site, ...]
    settings: Mapping[str, Settings]
    """By site name; layers and products only."""
    points: tuple[Point, ...]
    """In the order in which they are to be fitted on a tensor."""
    heads: Mapping[str, Site | None] = field(default_factory=dict)
    """The nodes in front of which the walk stops: every site, the first reader of every stored tensor, and whoever reads one in
    another width.
    """
    joined: Mapping[str, int] = field(default_factory=dict)
    """Bits of what each join makes."""


Results = frozenset[str]
"""The names of a model's outputs, which is all that a rule must know of it besides the node."""
Rule = Callable[[Node, Results], Iterator[tuple[str, str]]]
"""What is wrong with a node, as (reason, remedy), one sentence each; nothing where nothing is. It is called by its function's
name."""


@dataclass(frozen=True)
class Violation:
    """One rule of a target that one node breaks."""

    node: str
    op: str
    rule: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Encoding:
    """How a runtime wants quantized tensors written down. The defaults are those of ONNX Runtime on x86-64."""

    where: str = "regions"
    """Which tensors get quantizers: `regions` (the inputs of layers, and results that stay integers from one kernel to the
    next), `layers` (the inputs of layers), `inputs` (these and the skipped branch of a residual Add) or `units` (all that
    operators read or make).
    """
    signed: bool = False
    """Activation codes are int8, not uint8."""
    symmetric: bool = False
    """The zero point of activations is the middle of the codes: 0 where they are signed."""
    clip: str = "codes"
    """What keeps codes of fewer than 8 bits in their range: a Clip of the `codes`, or one of the `values` in front of them."""
    packed: str = "cast"
    """How narrow weights are stored: 4 bits as int4 behind a `cast`, and 2, 3, 5 and 6 in planes that a table turns into codes;
    those of 4 bits and fewer as int4 read by DequantizeLinear (`native`); or all as `int8`."""
    heads: str = "codes"
    """How the weights of products that are cut into heads are stored: `codes`, or `float` behind a quantizer."""
    bias: str = "int32"
    """The bias of a Conv between quantizers: `int32` with a DequantizeLinear, or `float`."""
    run_time: tuple[str, ...] = ("dynamic", "token")
    """Ranges that may be measured at run time, of a tensor or of each token; without data the first is taken."""
    fused: bool = True
    """What stands around a product is brought into the form that ONNX Runtime keeps integer, and a weight in front of a float
    operator into the form that it folds when it loads the file."""
    biased: bool = False
    """The bias of a MatMul goes into its integer kernel."""
    channels: int = 1
    """The channels of an input, which is read by one Conv alone, are filled up to a multiple of this: its kernel is faster."""
    depthwise: int = 1
    """The channels of a depthwise Conv are filled up to a multiple of this, where Convs alone make and read them."""
    timed: bool = False
    """Convs stay float where `timing` says that this is faster."""
    convs: bool = False
    """A ConvTranspose of fixed ranges is written as a Conv, which has an integer kernel."""
    saturates: bool = False
    """Sums of two 8-bit products may leave the 16 bits of its registers, so weights have 7 bits where that may happen."""
    tables: bool = True
    """Constants may be computed when the file is loaded, such as the table of a bias per token."""
    wide: bool = False
    """Activations of 16 bits are taken too."""
    blocks: tuple[int, ...] = ()
    """How many inputs may share a scale of a weight beside float activations, where there is a kernel that reads its codes."""
    block_bits: int = 8
    """Weights in blocks have at most so many bits."""
    partial: bool = False
    """The last of the blocks may be shorter."""
    embeddings: bool = False
    """Rows of a table may be gathered as codes."""

    def scheme(self, wanted: Settings) -> Scheme:
        """The scheme of a site's activations; unsigned until they are written down."""
        return Scheme(wanted.activation_bits, False, wanted.symmetric or self.symmetric)

    def storage(self, settings: Iterable[Settings]) -> Scheme:
        """The scheme of what nobody asks to be narrower: of 16 bits where these are asked for at all."""
        return Scheme(max([8, *(s.activation_bits for s in settings)]), False, self.symmetric)
