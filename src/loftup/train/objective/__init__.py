"""The objective of a training step: its terms, and their weighted sum."""
