"""The error that names bad data."""


class DataError(ValueError):
    """The data set cannot be used: says what, where and what to do."""
