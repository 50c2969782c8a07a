"""Released layouts, one file per model_type.

A new layout needs its file and an entry in `FAMILIES` (docs/extending.md). If several layouts represent a model equally
well, it is exported in the first of them.
"""

from mtp_jax.interop.families.common import OUTSIDE_BLOCKS, Family, Names, Values
from mtp_jax.interop.families.deepseek_v2 import DEEPSEEK_V2
from mtp_jax.interop.families.deepseek_v3 import DEEPSEEK_V3
from mtp_jax.interop.families.ernie4_5_moe import ERNIE4_5_MOE
from mtp_jax.interop.families.glm4_moe import GLM4_MOE
from mtp_jax.interop.families.gpt_oss import GPT_OSS
from mtp_jax.interop.families.kimi_k2 import KIMI_K2
from mtp_jax.interop.families.llama import LLAMA
from mtp_jax.interop.families.mimo import MIMO
from mtp_jax.interop.families.mimo_v2_flash import MIMO_V2_FLASH
from mtp_jax.interop.families.ministral import MINISTRAL
from mtp_jax.interop.families.mistral import MISTRAL
from mtp_jax.interop.families.qwen2 import QWEN2
from mtp_jax.interop.families.qwen3 import QWEN3
from mtp_jax.interop.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DEEPSEEK_V3,
        DEEPSEEK_V2,
        KIMI_K2,
        GLM4_MOE,
        QWEN3_MOE,
        ERNIE4_5_MOE,
        GPT_OSS,
        LLAMA,
        MISTRAL,
        MINISTRAL,
        QWEN2,
        QWEN3,
        MIMO,
        MIMO_V2_FLASH,
    )
}

# Known layouts that cannot be loaded, with the part that mtp_jax does not have.
UNSUPPORTED = {
    "glm_moe_dsa": "its blocks use sparse attention with an indexer",
    "qwen3_next": "its blocks use gated attention and linear attention",
    **dict.fromkeys(("gemma3", "gemma3_text"), "its blocks have four norms, which scale by 1 + w"),
}
