"""From documents to rows: tokenizer, sources, the token store, packing, the pipeline."""
