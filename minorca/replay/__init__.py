"""What receipts say, verified: of a run, of weights and of scores; and a run's steps, computed again."""
