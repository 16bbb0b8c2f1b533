"""The one exception class of this package."""


class LoftUpError(ValueError):
    """A name, file, repository or model that loftup cannot use; the text says got, expected, remedy.

    Wrong arguments (shapes, dtypes) raise plain ``ValueError`` or ``TypeError``.
    """
