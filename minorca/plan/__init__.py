"""Memory and speed of a run before anything is loaded: the real step on tensors that have no values."""
