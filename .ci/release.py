"""Make a checkout ready to be published: ``python .ci/release.py v0.1.0``, before anything is built from it.

PyPI and the Comfy registry show README.md and pyproject.toml away from the repository.  So relative links and the icon
get the repository's address at that tag.  The address is written in one place, ``Repository`` in pyproject.toml.
"""

import re
import sys
import tomllib
from pathlib import Path

RELATIVE = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")  # the target of a link or picture
PICTURES = (".jpg", ".png", ".svg")


def prepare(root: Path, tag: str) -> None:
    """Rewrite README.md and pyproject.toml in the folder of a checkout.

    Raises:
        SystemExit: The owner's name is not filled in, or the tag is not the version that the files say.
    """
    path, readme = root / "pyproject.toml", root / "README.md"
    text = path.read_text(encoding="utf-8")
    settings = tomllib.loads(text)
    repository, version = settings["project"]["urls"]["Repository"], settings["project"]["version"]
    if "/OWNER/" in repository:
        sys.exit("Repository in pyproject.toml still says OWNER: write there who owns the repository")
    if tag != f"v{version}":
        sys.exit(
            f"the tag is {tag} and pyproject.toml says version {version}: tag it v{version}, or change the version"
        )
    if f"\n## {version}\n" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        sys.exit(f"CHANGELOG.md has no section for {version}")
    icon = settings["tool"]["comfy"]["Icon"]
    text = text.replace(f'Icon = "{icon}"', f'Icon = "{absolute(icon, repository, tag)}"')
    pages = {"Documentation": "README.md", "Changelog": "CHANGELOG.md"}
    urls = {name: absolute(page, repository, tag) for name, page in pages.items()} | {"Issues": f"{repository}/issues"}
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    path.write_text(text.replace("[project.urls]\n", f"[project.urls]\n{lines}"), encoding="utf-8", newline="\n")
    linked = with_absolute_links(readme.read_text(encoding="utf-8"), repository, tag)
    readme.write_text(linked, encoding="utf-8", newline="\n")


def with_absolute_links(markdown: str, repository: str, tag: str) -> str:
    """The text with every relative link and picture made absolute; links within the page stay."""
    return RELATIVE.sub(lambda match: absolute(match[1], repository, tag) + (match[2] or ""), markdown)


def absolute(path: str, repository: str, tag: str) -> str:
    """The address of a file of the repository: of pictures the file itself, and else the page that shows it."""
    if path.endswith(PICTURES):
        return f"{repository.replace('//github.com/', '//raw.githubusercontent.com/')}/{tag}/{path}"
    return f"{repository}/blob/{tag}/{path}"


if __name__ == "__main__":
    prepare(Path(__file__).resolve().parent.parent, *sys.argv[1:])
