"""Multi-token prediction strategies: one interface, hidden states in and hidden states out."""
