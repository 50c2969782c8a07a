"""Kimi-K2: DeepSeek-V3's layout and modelling code under its own model_type.

Source: config.json of the released models, whose auto_map names DeepSeek-V3's classes.
"""

import dataclasses

from mtp_jax.interop.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2", accepts=(), ignored_layers=())
