"""Ministral: Mistral's layout with windows in some of the layers.

Source: transformers' ministral.
"""

import dataclasses

from mtp_jax.interop.families.mistral import MISTRAL

MINISTRAL = dataclasses.replace(MISTRAL, model_type="ministral", architecture="MinistralForCausalLM", window="typed")
