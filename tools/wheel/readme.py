"""README.md as a package index shows it, where no file lies beside it."""

import re

# Markdown's links and images, its definitions of links, and HTML's attributes: what
# stands before the target, the target, and whether a picture is meant.
_MARKDOWN = re.compile(r"(?P<before>(?P<bang>!?)\[[^][]*\]\()(?P<target>[^()\s]+)")
_LINKED_IMAGE = re.compile(
    r"(?P<before>\[!\[[^][]*\]\([^()]*\)\]\()(?P<target>[^()\s]+)"
)
_DEFINITION = re.compile(
    r"(?P<before>^ {0,3}\[[^][]+\]:\s+)(?P<target>\S+)", re.MULTILINE
)
_HTML = re.compile(r'(?P<before>\b(?P<name>src|srcset|href)=")(?P<target>[^"]+)')

_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def absolute_links(readme: str, repository: str, reference: str) -> str:
    """Lets relative links lead to `reference`, a tag or branch, of `repository`.

    Links within the page and what stands in blocks of code stay as they are. For the
    pages of folders, github.com answers a path of a file by the right one.
    """

    def absolute(match: re.Match) -> str:
        target = match["target"]
        if re.match(r"[a-z][a-z0-9+.-]*:|//|#", target):
            return match[0]
        groups = match.groupdict()
        is_image = groups.get("bang") or groups.get("name") in ("src", "srcset")
        kind = "raw" if is_image else "blob"
        path = target.removeprefix("./").removeprefix("/")
        return f"{match['before']}{repository}/{kind}/{reference}/{path}"

    parts = _FENCE.split(readme)
    for index in range(0, len(parts), 2):
        for pattern in (_LINKED_IMAGE, _MARKDOWN, _DEFINITION, _HTML):
            parts[index] = pattern.sub(absolute, parts[index])
    return "".join(parts)
