"""Errors of the evaluation that a user can fix; each message is one sentence."""

from mhla_gen.errors import UserError


class EvaluationError(UserError):
    """Images, features or statistics that cannot be evaluated as requested."""


class ProtocolMismatchError(EvaluationError):
    """Two sets that were measured differently, so their distance is meaningless."""
