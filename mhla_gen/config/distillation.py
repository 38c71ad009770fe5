"""Settings of distilling a pretrained softmax model into an MHLA model."""

from dataclasses import dataclass, field
from typing import Literal

from mhla_gen.config.fields import Count, FilePath, Fraction, NotNegative, Positive, Settings, Whole
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StageConfig(Settings, prefix="distill.stages."):
    """One stage of a distillation; None takes the value of the training settings.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: Literal["layers", "output"] = "output"
    """layers: every MHLA layer learns the output of the softmax layer that it replaces, all at
    once, on the teacher's activations. output: the whole model learns from the data and from the
    teacher's predictions."""
    steps: Count = 1000
    """Optimizer steps."""
    train: Literal["mhla", "attention", "all"] | None = None
    """Trained weights: what MHLA adds, the whole attention of converted layers, or all. None is
    attention for kind=layers and all for kind=output."""
    teacher_weight: NotNegative = 1.0
    """kind=output: the loss is the objective plus this times the mean squared distance to the
    teacher's prediction."""
    layer_error: Literal["sample", "token"] = "sample"
    """kind=layers: squared error relative to the target's squared norm, per sample, or per token,
    so that tokens with a small output count as much as the others."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    mhla_learning_rate: NotNegative | None = None
    """Peak learning rate of what MHLA adds."""
    warmup_steps: Whole | None = None
    """Steps until the peak learning rate."""
    ema_decay: Fraction | None = None
    """Decay of the averaged weights, which the next stage starts from."""

    def __post_init__(self):
        super().__post_init__()
        if self.train is None:
            default = "attention" if self.kind == "layers" else "all"
            self._settle(train=default)
        if self.kind == "layers" and self.train == "all":
            raise UserError(
                "distill.stages: a stage of kind=layers trains mhla or attention, found train=all"
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings, prefix="distill."):
    """A softmax teacher, and the stages in which a student learns from it.

    Raises:
        ValueError: If there is no teacher or no stage, or a stage of layers comes after one of
            output.
    """

    teacher: FilePath | None = None
    """The softmax model, given like `model.pretrained`. The student starts as its copy; `model`
    says which attention replaces softmax, and in which layers."""
    stages: list[StageConfig] = field(
        default_factory=lambda: [StageConfig(kind="layers"), StageConfig(kind="output")]
    )
    """Run one after the other, each in a folder of its own in output_dir."""
    start: FilePath | None = None
    """Student from earlier stages; None starts from the teacher's weights."""

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher:
            raise UserError("distill needs distill.teacher, the folder of a softmax model")
        if not self.stages:
            raise UserError("distill.stages must hold at least one stage")
        kinds = [stage.kind for stage in self.stages]
        if kinds != sorted(kinds):
            # A layer learns on the teacher's activations, which need the teacher's other weights.
            raise UserError(
                f"distill.stages: layers must come before output, found {', '.join(kinds)}"
            )
