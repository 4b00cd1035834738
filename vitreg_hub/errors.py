"""Everything a user can cause and fix. Any other exception is a bug and keeps its traceback."""


class VitregError(ValueError):
    """Base of everything a user can cause and fix."""


class UnknownArchError(VitregError):
    """A name that is in no table."""


class BundleError(VitregError):
    """A folder or repository that would not load through every door."""


class ConversionError(VitregError):
    """A checkpoint that does not fit its format, or that no bundle can hold."""


class DataError(VitregError):
    """A data set or image that cannot be used as asked."""


class HubError(VitregError):
    """A Hub that refused, or could not be reached."""


class HubRefusedError(HubError):
    """A Hub that says no, and would again."""


class LicenseError(VitregError):
    """Weights whose license nobody told, or that do not allow every use."""


class RecipeError(VitregError):
    """A training setting that is wrong, or that contradicts another."""


class TrainingError(VitregError):
    """A run that cannot go on."""
