"""Models for the examples. They know nothing of LoRA."""
