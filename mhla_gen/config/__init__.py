"""Every setting of the toolkit: frozen dataclasses, and `load_config` to read them.

A config file is YAML whose first key, `job`, names the command it belongs to. Values come from the
dataclass, then the file, then `key=value` overrides; a key that no dataclass has is an error.
"""

from mhla_gen.config.causal import FOR_PRETRAINED_LANGUAGE, CausalMHLAConfig
from mhla_gen.config.data import (
    AutoencoderConfig,
    CacheConfig,
    ClipsConfig,
    DataConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
)
from mhla_gen.config.distillation import DistillConfig, StageConfig
from mhla_gen.config.evaluation import EvaluateConfig, FeaturesConfig, ReferenceConfig
from mhla_gen.config.inspection import InputsConfig, InspectConfig, SensitivityConfig
from mhla_gen.config.linformer import AttentionConfig, LinformerConfig, attention_from_dict
from mhla_gen.config.load import SCHEMAS, ConfigError, load_config, save_config, to_yaml
from mhla_gen.config.mhla import FOR_PRETRAINED, MHLAConfig
from mhla_gen.config.model import ModelConfig
from mhla_gen.config.previews import PreviewConfig, RunEvaluationConfig
from mhla_gen.config.sampling import SampleConfig
from mhla_gen.config.tools import BenchConfig, ConvertConfig, DoctorConfig
from mhla_gen.config.training import ObjectiveConfig, QuickstartConfig, TrainConfig
from mhla_gen.config.transformer import TransformerConfig
from mhla_gen.config.wan import WAN_PRESETS, WanConfig

__all__ = [
    "FOR_PRETRAINED",
    "FOR_PRETRAINED_LANGUAGE",
    "SCHEMAS",
    "WAN_PRESETS",
    "AttentionConfig",
    "AutoencoderConfig",
    "BenchConfig",
    "CacheConfig",
    "CausalMHLAConfig",
    "ClipsConfig",
    "ConfigError",
    "ConvertConfig",
    "DataConfig",
    "DistillConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "ImageEncoderConfig",
    "InputsConfig",
    "InspectConfig",
    "LinformerConfig",
    "MHLAConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PreviewConfig",
    "QuickstartConfig",
    "ReferenceConfig",
    "RunEvaluationConfig",
    "SampleConfig",
    "SensitivityConfig",
    "StageConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "TransformerConfig",
    "WanConfig",
    "attention_from_dict",
    "load_config",
    "save_config",
    "to_yaml",
]
