"""A training run as a config: its sections with their bounds, what goes together, YAML and the command line."""

from ...errors import LoftUpError

try:
    from .check import *  # noqa: F403
    from .read import *  # noqa: F403
    from .schema import *  # noqa: F403
except ModuleNotFoundError as error:
    raise LoftUpError(f'training configs need {error.name}: pip install "loftup[train]"') from error
