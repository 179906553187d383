"""What the site does to pages that are also read in the repository."""

import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, **given) -> str:
    """A link to a file that is not of the site becomes its text and, but for a test, its path."""
    return OUTSIDE.sub(lambda link: link[1] if "tests/" in link[2] else f"{link[1]} (`{link[2][3:]}`)", markdown)
