"""Passwords in what Postgres logs: the statement of a failed `ALTER ROLE ... PASSWORD`, and what quotes it.

A record that speaks of a password or a secret loses the literals of its statement, and whatever repeats them. Rather too
much is hidden than too little: where a quote or a comment has no end, all that follows goes.
"""

from __future__ import annotations

import re

HIDDEN = "***"
TEXTS = ("message", "detail", "hint", "context", "statement", "internal_query")
"""Keys of a record that hold words of people and programs."""

_SIGNS = (b"passw", b"passphrase", b"secret", b"credential", b"://", b"at or near")
_WORD = re.compile(r"passw|passphrase|secret|credential", re.IGNORECASE)
_ADDRESS = re.compile(r"(\w://[^\s:/@'\"]*):[^\s/@]+@")
_PAIR = re.compile(r"(?<!\w)(?P<key>\w++)(?P<sign>\s*+=\s*+)(?:\"[^\"]*+\"?|[^\s'\",;()]++)")
_COLUMN = re.compile(r"column (?P<key>\w++): .*", re.IGNORECASE | re.DOTALL)
_NEAR = re.compile(r"(error at or near |unterminated [^\"]{1,60} at or near )\".*", re.DOTALL)
_ROLE = re.compile(r"\b(?:role|user|group)\b", re.IGNORECASE)
_BARE = re.compile(
    r"(\bpassword\s++)(?!null\b)(\"(?:[^\"]|\"\")*+\"?|[^\s'\"$;,()=]++)",
    re.IGNORECASE,
)
"""A password that was not quoted as a string is an error of syntax, and is logged for it."""
_MESSAGE_WITH_STATEMENT = re.compile(r"(?:duration: \S+ ms  )?(?:statement|execute|parse|bind|fastpath)\b[^:]*: ")
_LITERAL = r"""
    \$(?P<tag>\w*)\$ .*? (?: \$(?P=tag)\$ | \Z )
  | [eE]'(?: [^'\\] | \\. | '' )* (?: ' | \Z )
  | '(?: [^'] | '' )* (?: ' | \Z )
"""
_PIECES = re.compile(_LITERAL, re.VERBOSE | re.DOTALL)
_PIECES_OF_STATEMENT = re.compile(
    rf"""(?P<comment> --[^\n]* | /\* .*? (?: \*/ | \Z ) ) | (?P<name> "(?: [^"] | "" )* (?: " | \Z ) ) | {_LITERAL}""",
    re.VERBOSE | re.DOTALL,
)
TEXT_MAX_CHARACTERS = 16 * 1024
"""Of each text of a record that may hold a secret: what follows is left out, so that looking for it stays cheap."""
# Shorter than a password ever is, and so often a word of the message itself.
_REPEATED_MIN = 3
_REPEATED_MAX = 64


def may_hold_secret(raw: bytes) -> bool:
    """A quick look at a record as it was written: is `hide_secrets` needed at all?"""
    lowered = raw.lower()
    return any(sign in lowered for sign in _SIGNS)


def hide_secrets(record: dict[str, object]) -> None:
    """Replace what may be a secret by `***`, in the texts of the record itself."""
    texts = {
        key: _ADDRESS.sub(rf"\1:{HIDDEN}@", value[:TEXT_MAX_CHARACTERS])
        for key in TEXTS
        if isinstance(value := record.get(key), str)
    }
    if "statement" not in texts and "message" in texts:
        # Where statements are not logged (`log_min_error_statement`), nothing tells what it is that is quoted here.
        texts["message"] = _NEAR.sub(rf'\g<1>"{HIDDEN}"', texts["message"])
    if any(_WORD.search(text) for text in texts.values()):
        found: set[str] = set()
        for key, text in texts.items():
            is_statement = key in ("statement", "internal_query") or _MESSAGE_WITH_STATEMENT.match(text) is not None
            texts[key] = _without_literals(text, is_statement=is_statement, found=found)
        for literal in sorted(found, key=len, reverse=True)[:_REPEATED_MAX]:
            repeated = re.compile(rf"(?<!\w){re.escape(literal)}(?!\w)")
            texts = {key: repeated.sub(HIDDEN, text) for key, text in texts.items()}
    record.update(texts)


def _without_literals(text: str, *, is_statement: bool, found: set[str]) -> str:
    def keep_in_mind(*values: str) -> None:
        found.update(value for value in values if len(value) >= _REPEATED_MIN)

    def hide(match: re.Match[str]) -> str:
        piece = match[0]
        if is_statement and match["name"] is not None:
            if len(piece) > 1 and piece.endswith('"'):
                return piece
            keep_in_mind(piece.strip('" '))
            return f'"{HIDDEN}'
        if is_statement and match["comment"] is not None:
            return f"--{HIDDEN}" if piece.startswith("--") else f"/*{HIDDEN}*/"
        inner = piece.strip("eE$'") if match["tag"] is None else piece.strip("$").removeprefix(match["tag"])
        keep_in_mind(inner, inner.strip(), inner.replace("''", "'"))
        return f"'{HIDDEN}'"

    def hide_bare(match: re.Match[str]) -> str:
        keep_in_mind(match[2].strip('"'))
        return match[1] + HIDDEN

    if is_statement:
        if (role := _ROLE.search(text)) is not None:
            text = text[: role.end()] + _BARE.sub(hide_bare, text[role.end() :])
        # Which quote ends a literal depends on a setting here, and how deep a comment goes on its nesting: all of it goes.
        if "\\'" in text or text.count("/*") > 1:
            first = min(at for sign in ("'", "/*", "$") if (at := text.find(sign)) >= 0)
            keep_in_mind(*(word for word in re.findall(r"\w{4,}", text[first:]) if word.casefold() not in _COMMON))
            return text[:first] + HIDDEN
    text = (_PIECES_OF_STATEMENT if is_statement else _PIECES).sub(hide, text)
    text = _PAIR.sub(
        lambda found: found["key"] + found["sign"] + HIDDEN if _WORD.search(found["key"]) else found[0], text
    )
    return _COLUMN.sub(
        lambda found: f"column {found['key']}: {HIDDEN}" if _WORD.search(found["key"]) else found[0], text
    )


_COMMON = frozenset({"password", "syntax", "error", "near", "role", "user", "statement", "line", "column"})
"""Words of Postgres's own messages, which say nothing of a secret."""
