"""Two models or adapters on the same prompts: the command, the comparison and its page."""
