"""The earlier place of `tests.helpers.families`, which published scripts import."""

from tests.helpers.families import FAMILIES

__all__ = ["FAMILIES"]
