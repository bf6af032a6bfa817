"""Sources -> rows -> tokens and a loss mask -> packed batches: sources.py, store.py, packing.py."""
