"""What may be an id, and what may be a text, in both databases alike."""

import re

MOST_TEXTS = 10_000  # of a person; as many answers that they edited, and as many rankings
MOST_CHARACTERS = 10_000_000  # of a person in all of these together: what one may take in memory is bounded by it
_ID = re.compile(r"[A-Za-z0-9._:@-]{1,128}")


def require_id(value: object, what: str) -> str:
    """``value`` if it can be the id of something: 1 to 128 characters of ``A-Z a-z 0-9 . _ : @ -``, no path.

    Raises:
        ValueError: naming ``what`` it is, what was found and what is expected.
    """
    if isinstance(value, str) and _ID.fullmatch(value) and value not in (".", ".."):
        return value
    found = f"{value[:40]!r} ({len(value)} characters)" if isinstance(value, str) else repr(value)[:60]
    raise ValueError(
        f"{what} is {found}; expected 1 to 128 characters, each a letter A-Z or a-z, a digit or one of . _ : @ -, "
        'and neither "." nor ".."'
    )


def require_text(value: object, what: str) -> str:
    """``value`` if it is a string that can be stored: PostgreSQL takes no NUL, and half a surrogate pair is no text.

    Raises:
        ValueError: naming ``what`` it is and what is wrong with it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is of type {type(value).__name__}; expected a string")
    if "\0" in value:
        raise ValueError(f"{what} holds the character U+0000 at position {value.index(chr(0))}, which cannot be stored")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair at position {error.start}, which is no text") from None
    return value
