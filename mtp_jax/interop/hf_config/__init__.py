"""config.json of released layouts <-> our `Config`, in both directions from the tables of `hf_fields`.

reading.py   config.json -> Config
writing.py   Config -> config.json
"""

from mtp_jax.interop.hf_config.reading import MODEL_TYPES, longest_text, read_config, to_config
from mtp_jax.interop.hf_config.writing import from_config, layout_of
