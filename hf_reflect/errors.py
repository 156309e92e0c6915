"""Errors a person can act on: what is wrong, where, and what to do."""


class HfReflectError(Exception):
    """Base of every error this package raises on purpose; the command line prints its message and exits with 1."""


class SourceError(HfReflectError):
    """The source dataset can't be read."""


class UnknownFormatError(HfReflectError):
    """The columns of the source fit no row format."""


class PromptError(HfReflectError):
    """A file of prompts is not usable."""


class OracleError(HfReflectError):
    """The oracle can't be asked, and asking again will not help: the run stops."""


class StudentError(HfReflectError):
    """The student can't be loaded or can't score."""


class OutputError(HfReflectError):
    """The output folder can't be written, or holds something else."""


class RecipeError(HfReflectError):
    """The recipe is contradictory or names an unknown option."""


class CardError(HfReflectError):
    """A card can't be written."""


class HubError(HfReflectError):
    """Something can't be pushed to the Hub or had from it."""


class JournalError(HfReflectError):
    """The journal can't be opened or written."""


class HfReflectWarning(UserWarning):
    """Something that a person should know about a result."""
