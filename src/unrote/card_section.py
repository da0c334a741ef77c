"""The place in a model card where an audit writes its result."""

BEGIN = "<!-- unrote audit: begin -->"
END = "<!-- unrote audit: end -->"


def section(content: str) -> str:
    """``content`` between marks that are not shown."""
    return f"{BEGIN}\n{content.strip()}\n{END}"


def with_section(card: str, content: str) -> str:
    """``card`` with ``content`` in place of what is between the marks; at the end of a card that has none.

    >>> with_section("a\\n" + section("old") + "\\nb", "new") == "a\\n" + section("new") + "\\nb"
    True
    """
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return f"{card.rstrip()}\n\n{section(content)}\n"
    return before + section(content) + after
