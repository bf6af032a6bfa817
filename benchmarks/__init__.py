"""What minorca costs in time and memory, beside transformers and PEFT in the same run."""
