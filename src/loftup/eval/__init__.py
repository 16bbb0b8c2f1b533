"""Comparing feature upsamplers: other methods, the paper's six tasks, tables. Needs ``pip install "loftup[eval]"``."""
