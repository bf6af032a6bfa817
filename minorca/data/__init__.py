"""Data sets to packed batches: sources, chat templates, the tokenizer, the token store, packing."""
