"""Text that may be shown in a terminal, whoever wrote it."""


def printable(text: str) -> str:
    """`text` without characters that could steer a terminal; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
