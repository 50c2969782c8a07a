"""Parts of `mtp_jax.tools.distill`: prompts, answers, the training config, and the table before and after."""
