"""Training configs for tests."""

from loftup.train.config import TrainConfig


def configured(made: TrainConfig, **settings: object) -> TrainConfig:
    """Set fields by their path, data__sizes=[64] for made.data.sizes."""
    for key, value in settings.items():
        *path, last = key.split("__")
        place = made
        for name in path:
            place = getattr(place, name)
        assert hasattr(place, last), key
        setattr(place, last, value)
    return made
