"""Settings of training, and of the quickstart."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mhla_gen.config.checks import check_checkpointing
from mhla_gen.config.data import DataConfig
from mhla_gen.config.distillation import DistillConfig
from mhla_gen.config.fields import (
    Count,
    FilePath,
    Finite,
    Fraction,
    Guidance,
    NotNegative,
    Positive,
    ProfileWidth,
    Seed,
    Settings,
    Whole,
)
from mhla_gen.config.mhla import MHLAConfig
from mhla_gen.config.model import ModelConfig
from mhla_gen.config.previews import PreviewConfig, RunEvaluationConfig
from mhla_gen.config.transformer import TransformerConfig
from mhla_gen.config.wan import WanConfig
from mhla_gen.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings, prefix="objective."):
    """What the model learns to predict, and at which noise levels.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: Literal["flow_matching", "ddpm"] = "flow_matching"
    """flow_matching: the velocity on the straight path from sample to noise. ddpm: the noise, as
    DiT was trained, with 1000 timesteps and linear betas."""
    logit_mean: Finite = 0.0
    """flow_matching: mean of the logit of the noise level σ; above 0 means more noise."""
    logit_std: Positive = 1.0
    """flow_matching: standard deviation of the logit of σ."""
    shift: Positive = 1.0
    """flow_matching: moves σ to s σ / (1 + (s − 1) σ), as diffusers' schedulers do in sampling:
    larger images need more noise to lose the same detail."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """ddpm: what the model predicts."""
    learned_variance: bool = True
    """ddpm: learn the variance too, by the variational bound; doubles the output channels."""
    min_snr_gamma: Positive | None = None
    """Weigh losses by min(SNR, γ), measured on the predicted sample; 5 is usual. None applies no
    weights to the loss of the prediction."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Training of a diffusion transformer.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: FilePath = "runs/train"
    """New folder for the log, the checkpoints and the trained pipeline."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to learn from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What to train."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it learns to predict."""
    wan: WanConfig | None = None
    """Train a Wan on clips with captions, instead of a DiT on images with labels: from
    model.pretrained, or new. The settings of attention and trainable in model apply too."""
    transformer: TransformerConfig | None = None
    """Train any other text-to-image or text-to-video transformer on captions, instead of a DiT:
    from model.pretrained, or new. The settings of attention and trainable in model apply too."""
    distill: DistillConfig | None = None
    """Distill a pretrained softmax model into this one, in stages, instead of plain training."""
    seed: Seed = 0
    """Fixes the initial weights, the order of the samples and all noise."""
    max_steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 256
    """Images or clips per optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    optimizer: str = "AdamW"
    """Optimizer class: one of torch.optim, such as Adafactor, or of bitsandbytes, such as
    bitsandbytes.AdamW8bit, whose state takes a quarter of the memory."""
    optimizer_options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of this class, such as {betas: [0.9, 0.95]}."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    mixing_learning_rate: NotNegative | None = None
    """Peak learning rate of mixing matrices; by default that of the other MHLA weights."""
    mhla_learning_rate: NotNegative | None = None
    """Peak learning rate of what MHLA adds to the layers; by default learning_rate. As it starts as
    the identity, it may learn faster than pretrained weights."""
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    """Learning rate schedule, by its diffusers name."""
    warmup_steps: Whole = 100
    """Steps until the peak learning rate is reached."""
    weight_decay: NotNegative = 0.0
    """Weight decay of matrices; biases, embeddings, norms and mixing matrices have none."""
    max_grad_norm: Positive | None = 1.0
    """Clip gradients to this norm; None does not clip."""
    mixed_precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the forward pass; weights stay float32."""
    float8: bool = False
    """With bf16, compute matrix products of feed-forward layers in float8, through torchao; needs a
    GPU that supports it (H100, L4, RTX 4090 and newer)."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """How several processes train. ddp: each has the whole model. fsdp: each has a shard of
    weights, gradients, optimizer and EMA (FSDP2)."""
    compile: Literal["none", "regional", "whole"] = "none"
    """torch.compile: regional compiles one transformer block and uses it for all; whole compiles
    the model, which takes longer. Every size in the data is compiled by itself, but for
    lengths of captions."""
    cuda_graphs: bool | None = None
    """With compile=regional on GPUs: record the forward and backward pass of a DiT as CUDA graphs
    and replay them at every step, also under DDP. null: wherever this is possible, so not with
    parallelism=fsdp, which moves the weights; true: or raise an error; false: launch every
    kernel."""
    one_pass: bool | None = None
    """With optimizer=AdamW on GPUs: clip gradients, update weights and average them in one pass
    over the memory, which is faster; numbers are the same but for rounding. null: wherever this is
    possible, so not with parallelism=fsdp, nor with amsgrad or maximize; true: or raise an error;
    false: in three passes."""
    gradient_checkpointing: Any = False
    """Recompute activations in the backward pass: less memory, more time. true, for all blocks;
    a number from 0 to 1, for this share of them; false, for none; selective, for all blocks, but
    keep the outputs that take longest to compute for their size, those of softmax on many keys and
    of each feed-forward layer."""
    ema_decay: Fraction = 0.9999
    """Decay of the EMA weights, with which the pipeline is saved."""
    ema_width: ProfileWidth | None = None
    """Use EDM2's average instead of ema_decay; its width is this share of the training so far."""
    label_dropout: Fraction = 0.1
    """Share of labels that are dropped, for classifier-free guidance."""
    checkpoint_every: Whole = 1000
    """Steps between checkpoints; the last step has one, too. 0 disables them."""
    keep_checkpoints: Count = 2
    """Number of checkpoints to keep."""
    log_every: Count = 50
    """Steps per line of log.jsonl."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where to send curves and pictures, besides log.jsonl and previews in output_dir."""
    sample_every: Whole = 1000
    """Steps between previews: samples of the EMA weights, and mixing matrices. 0 disables them."""
    samples: PreviewConfig = field(default_factory=PreviewConfig)
    """Samples in a preview."""
    evaluate_every: Whole = 0
    """Steps between evaluations of samples of the EMA weights. 0 disables them."""
    evaluation: RunEvaluationConfig = field(default_factory=RunEvaluationConfig)
    """How samples are evaluated."""
    resume: Literal["never", "latest", "whole"] = "never"
    """latest resumes from the newest checkpoint in output_dir, or starts a run if there is none.
    whole does the same, but skips damaged checkpoints and renames them."""
    unpickle_checkpoint: bool = False
    """Resume from a checkpoint of an earlier version, which contains pickles: these can execute
    code when they are read. Newer checkpoints have none."""

    def __post_init__(self):
        super().__post_init__()
        check_checkpointing("gradient_checkpointing", self.gradient_checkpointing)
        if self.data.source == "clips":
            raise UserError(
                "data.source=clips must be cached first: run `mhla-gen cache`, then train with "
                "data.source=cache"
            )
        if self.float8 and self.mixed_precision != "bf16":
            raise UserError(f"float8 needs mixed_precision=bf16, found {self.mixed_precision}")
        if self.wan is not None and self.transformer is not None:
            raise UserError(
                "wan and transformer are given; a Wan needs wan, all others transformer"
            )
        if self.model.trainable == "lora" and self.takes_labels:
            raise UserError(
                "model.trainable=lora needs wan or transformer: diffusers' DiT takes no adapters"
            )
        shares = self.model.attention == "linformer" and self.model.linformer.sharing == "layerwise"
        if shares and self.parallelism == "fsdp":
            raise UserError(
                "model.linformer.sharing=layerwise reads weights of another layer, which is not "
                "possible with parallelism=fsdp; use sharing=key_value or parallelism=ddp"
            )
        if self.parallelism == "fsdp" and self.optimizer not in ("AdamW", "Adam", "SGD", "Adagrad"):
            raise UserError(
                f"optimizer {self.optimizer} cannot work on parts of the weights, as "
                "parallelism=fsdp has them; take AdamW, Adam, SGD or Adagrad, or parallelism=ddp"
            )
        if self.evaluate_every and self.evaluation.reference is None:
            raise UserError("evaluate_every needs evaluation.reference: images or statistics")

    @property
    def takes_labels(self) -> bool:
        """Whether a DiT learns class labels."""
        return self.wan is None and self.transformer is None

    @property
    def without_stages(self) -> "TrainConfig":
        """These settings with the teacher of a distillation as a pretrained model.

        They build the model that its stages train.
        """
        if self.distill is None:
            return self
        model = replace(self.model, pretrained=self.distill.teacher)
        return replace(self, model=model, distill=None)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Settings):
    """The whole job in minutes: train on digits, sample, evaluate; twice, once with one block.

    Raises:
        ValueError: If a value is out of its range.
    """

    output_dir: FilePath = "runs/quickstart"
    """New folder for everything that the quickstart writes."""
    seed: Seed = 0
    """Fixes training and samples."""
    max_steps: Count = 600
    """Optimizer steps of each of the two models."""
    batch_size: Count = 128
    """Images per step."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            mhla=MHLAConfig(layout=(2, 2)),
            patch_size=2,
            num_layers=4,
            num_attention_heads=4,
            attention_head_dim=32,
        )
    )
    """The MHLA model; the control differs only in its layout of one block."""
    samples_per_class: Count = 20
    """Samples of each digit, for both models."""
    num_inference_steps: Count = 40
    """Denoising steps."""
    guidance_scale: Guidance = 1.5
    """Classifier-free guidance."""

    def __post_init__(self):
        super().__post_init__()
        if self.model.attention != "mhla":
            raise UserError(
                f"the quickstart trains model.attention=mhla, found {self.model.attention}; use "
                "`mhla-gen train` for the other kinds"
            )
        if not self.model.mhla.has_linear:
            raise UserError(
                "the quickstart draws mixing matrices, so model.mhla must keep MHLA's half"
            )
