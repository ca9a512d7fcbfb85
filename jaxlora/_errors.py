"""The ways in which a request, or a file, can be wrong. All are ValueErrors."""


class TargetError(ValueError):
    """A pattern that matches nothing, or a leaf that cannot carry an adapter."""


class RolesError(ValueError):
    """The roles of a weight's dimensions are missing, malformed, or contradict its use."""


class MaterializeError(ValueError):
    """A use of an adapted weight that would have to form W + BA."""


class AdapterFileError(ValueError):
    """A file of an adapter that is damaged, that does not fit, or that cannot be represented."""
