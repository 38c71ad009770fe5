"""Settings of the commands that inspect models."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mhla_gen.config.checks import elements, normalize_classes, normalize_integers
from mhla_gen.config.data import DataConfig
from mhla_gen.config.fields import (
    AtLeastTwo,
    Count,
    FilePath,
    NotNegative,
    Positive,
    Range,
    Seed,
    Settings,
    Whole,
)
from mhla_gen.config.mhla import MHLAConfig
from mhla_gen.errors import UserError

Timestep = Annotated[int, Range(0, 1000, open_high=True)]
FREE_OF_SCAN = ("output_dir", "softmax_layers", "max_error", "device")
"""A scan may be resumed with other values of these: a finished one answers for any budget."""


@dataclass(frozen=True, kw_only=True)
class InputsConfig(Settings):
    """A model to inspect, and its inputs.

    Raises:
        ValueError: If a value is out of its range.
    """

    model: FilePath | None = None
    """A folder written by `save_pretrained` (model or pipeline), a run of train or quickstart, or a
    name on the Hugging Face hub."""
    component: str = "transformer"
    """Transformer of the pipeline; the second expert of Wan 2.2 is transformer_2."""
    data: DataConfig | None = None
    """Images to add noise to, as in `train`; None runs the model on pure noise."""
    num_inputs: Annotated[int, Range(1, 10_000)] = 4
    """Number of inputs; each is used at every timestep."""
    classes: Any = "all"
    """Class numbers of the inputs, in turn; "all" counts up from 0. Data have their own."""
    timesteps: tuple[Timestep, ...] = ()
    """Noise levels in [0, 1000). Empty: 999 for pure noise, where sampling starts; 500 for data."""
    grid: Any = None
    """Tokens along each axis; for Wan: latent frames, height and width after patching. None: the
    size of the run that trained the model, or else the model's own."""
    seed: Seed = 0
    """Fixes noise, text embeddings, and the choice of data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        self._settle(classes=normalize_classes(self.classes))
        if self.grid is not None:
            self._settle(grid=normalize_integers("grid", self.grid, 1))
        if self.data is not None and self.classes != "all":
            raise UserError("data have their own classes; leave out classes or data")

    def require_model(self) -> None:
        """Raise unless there is something to inspect.

        Raises:
            UserError: Naming the setting.
        """
        if self.model is None:
            raise UserError(
                "inspect needs a model: a folder or a name on the hub, as first argument or model=…"
            )


@dataclass(frozen=True, kw_only=True)
class InspectConfig(InputsConfig):
    """Pictures and statistics of a model's self-attention.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: FilePath = "runs/inspect"
    """New folder for index.html, its pictures and statistics.json."""
    teacher: FilePath | None = None
    """A softmax model to compare with on the same inputs; given like `model`."""
    queries: Any = "auto"
    """Query tokens to draw attention maps for, a list of positions on the grid; "auto" takes four.
    Maps are of the first input; rank and entropy are averaged over all."""
    head: Whole | None = None
    """Head to draw maps of; None draws the mean over heads."""
    max_rows: AtLeastTwo = 512
    """Queries to compute rank and entropy from, chosen at random if there are more. Attention
    weights are computed in float64 from the model's queries and keys."""

    def __post_init__(self):
        super().__post_init__()
        if self.queries != "auto":
            listed = elements(self.queries)
            if not listed:
                raise UserError(
                    f'queries must be "auto" or a list of positions such as [[0, 3], [2, 2]], '
                    f"found {self.queries!r}"
                )
            positions = tuple(normalize_integers("queries", q, 0) for q in listed)
            self._settle(queries=positions)


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig(InputsConfig):
    """How replacing single layers of a softmax model by MHLA changes the model's output.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: FilePath = "runs/sensitivity"
    """New folder for sensitivity.json, sensitivity.png and plan.yaml."""
    timesteps: tuple[Timestep, ...] = (100, 300, 500, 700, 900)
    """Noise levels in [0, 1000)."""
    mhla: MHLAConfig = field(default_factory=MHLAConfig)
    """What replaces softmax; `layers` selects the layers to try."""
    distill_steps: Whole = 0
    """Steps of layer-wise distillation before the errors are measured, on fresh inputs."""
    distill_batch_size: Count = 4
    """Inputs per step."""
    learning_rate: Positive = 1e-3
    """Learning rate of these steps, with Adam."""
    softmax_layers: Whole | None = None
    """Budget of the plan: this many layers stay softmax, those with the largest errors."""
    max_error: NotNegative | None = None
    """Budget of the plan: the sum of the errors of all replaced layers stays below this, with as
    few softmax layers as possible."""

    def __post_init__(self):
        super().__post_init__()
        if not self.timesteps:
            raise UserError("timesteps must name at least one noise level")
        if self.softmax_layers is not None and self.max_error is not None:
            raise UserError("softmax_layers and max_error are two budgets; give only one")
