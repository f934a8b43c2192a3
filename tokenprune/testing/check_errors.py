"""The errors that a conformance check raises."""


class CheckError(Exception):
    """A check failed; the message states the action, the expected result and the actual result."""


class NotApplicableError(Exception):
    """A check does not apply to a strategy."""
