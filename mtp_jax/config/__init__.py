"""The configuration: frozen dataclasses, the conversion of a config file to them, and its validation.

`load_config` converts a file's ConfigDict and the command line's overrides once to a frozen `Config`; all other code
reads only that.
"""

from mtp_jax.config import shipped
from mtp_jax.config.aliases import current_key, renamed
from mtp_jax.config.checks import MAX_DEPTH, check_data, mesh_sizes, profiled_steps, validate
from mtp_jax.config.fields import UserError, check_bounds, key_hints, value_of, walk, with_values
from mtp_jax.config.load import default_config, from_dict, load_config, to_config_dict, to_dict, with_own_tokenizer
from mtp_jax.config.schema import (
    CONVENTIONS,
    Architecture,
    CheckpointConfig,
    Config,
    Conventions,
    DataConfig,
    GatedUnitConfig,
    Llama3Config,
    LocalConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    MTPConfig,
    MuonConfig,
    OptimizerConfig,
    RopeConfig,
    RouterConfig,
    SourceConfig,
    TrainingConfig,
    ValidationConfig,
    YarnConfig,
    conventions,
)
