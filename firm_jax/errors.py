"""The errors a user can meet. Every message names the thing, the place and the remedy."""


class FirmError(Exception):
    """Base of every error that firm_jax raises on purpose."""


class ConfigError(FirmError):
    """A configuration key, value or variant that cannot be used."""


class CheckpointError(FirmError):
    """A training checkpoint that cannot be written, read or continued from."""


class WeightsError(FirmError):
    """Model weights that are missing, unreadable, or do not fit the architecture."""


class DataError(FirmError):
    """A data file or record that cannot be used."""


class CriticError(FirmError):
    """A critic that does not give usable judgements."""


class NonFiniteError(FirmError):
    """A loss or gradient that is NaN or infinite, more often than the run tolerates."""


class WorkdirError(FirmError):
    """A run folder that cannot be created, written or locked."""


class BudgetError(FirmError):
    """A budget of money or tokens that the next call could exceed."""
