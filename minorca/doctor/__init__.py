"""What this machine will do, and what to change."""
