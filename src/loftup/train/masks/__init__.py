"""Making class-agnostic masks for folders of pictures."""
