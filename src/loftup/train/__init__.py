"""Training LoftUp for any backbone: masks, objectives, engine. Needs ``pip install "loftup[train]"``."""
