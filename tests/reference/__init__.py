"""Slow, obvious numpy oracles in float64, written from the papers and sharing no code with mtp_jax.

DeepSeek-V2 (2405.04434) for multi-head latent attention, DeepSeek-V3 (2412.19437) for the router, its balance loss and
sequential multi-token prediction, Gloeckle et al. 2024 (2404.19737) for parallel heads, TOP (2508.19228), NextLat
(2511.05963, through third-party notes) and Bebop (2606.12370, the end-to-end total variation). Loops instead of
broadcasting wherever a mistake could hide in the broadcast.

Parameters are nested dicts of arrays, `x @ W`. Shape letters: B rows, T positions, D embed (or extra depths where it
counts heads), K = D + 1 depths, H heads, G key/value heads, N nope dims, R rope dims, C latent, F feed-forward,
E experts, V vocabulary.
"""
