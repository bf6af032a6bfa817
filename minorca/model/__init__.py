"""The network, and how a model is built."""
