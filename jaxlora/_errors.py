"""The ways in which a request, or a file, can be wrong. All are ValueErrors."""


class TargetError(ValueError):
    """A pattern that matches nothing, or a leaf that cannot carry an adapter."""


class CheckpointError(TargetError):
    """Files that hold no whole adapter, or one that does not belong on the params.

    Attributes:
      paths: where the params differ from the adapter's base, if that is what is wrong.
    """

    paths: tuple[str, ...] = ()


class RolesError(ValueError):
    """The roles of a weight's dimensions are missing, malformed, or contradict its use."""


class MaterializeError(ValueError):
    """A use of an adapted or quantized weight that would have to form its value as an array."""


class AdapterFileError(ValueError):
    """A file of an adapter that is damaged, that does not fit, or that cannot be represented."""
