"""What the ranker and the document encoder share. Importing it says what to install where Haystack is missing."""

from kalm_integrations.errors import MissingExtraError

try:
    import haystack  # noqa: F401
except ImportError as error:
    msg = 'the Haystack components need haystack-ai, which cannot be imported; run: pip install "kalm-integrations[haystack]"'
    raise MissingExtraError(msg) from error
