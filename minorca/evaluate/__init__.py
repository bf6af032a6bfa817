"""Evaluation: log-probabilities that do not depend on the batch, lm_eval's harness on them, and suites."""
