"""What mkdocs needs to know about this repository: where the package is, and how pages outside docs/ are linked.

The repository root is the package ``ztsnr``, so no folder on the search path has that name.  Pages also link to files
beside ``docs/``, as GitHub shows them.  Here each such file becomes a page of the site, or an address on GitHub.
"""

import posixpath
import re
import tempfile
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that lie outside docs/, by their path in the repository.
PAGES = {
    "README.md": "index.md",
    "README.zh.md": "zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
}
SOURCES = {uri: path for path, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(?=(?:#[^)\s]*)?\))")  # a relative target, without its anchor

_package = tempfile.TemporaryDirectory(prefix="ztsnr-docs-")


def link_package(folder: Path) -> None:
    """Make ``folder/ztsnr`` of links to the modules and rooms, for griffe, which reads sources and imports nothing."""
    package = folder / "ztsnr"
    package.mkdir(exist_ok=True)
    for path in [*ROOT.glob("*.py"), *(init.parent for init in ROOT.glob("*/__init__.py"))]:
        link = package / path.name
        if not link.exists():
            link.symlink_to(path, target_is_directory=path.is_dir())


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tell mkdocstrings where the package is, and mkdocs where the repository is."""
    link_package(Path(_package.name))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_package.name]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config.repo_url = settings["project"]["urls"]["Repository"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right on GitHub into links that are right on the site."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")
    return LINK.sub(lambda match: site_link(match[1], source, uri, config.repo_url), markdown)


def site_link(target: str, source: str, uri: str, repository: str) -> str:
    """A link of the file ``source`` of the repository, as it stands in the page ``uri``.

    Raises:
        PluginError: the target does not exist.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in PAGES:
        return posixpath.relpath(PAGES[path], posixpath.dirname(uri) or ".")
    if path.startswith("docs/") and (ROOT / path).is_file():
        return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(uri) or ".")
    if not (ROOT / path).exists():
        raise PluginError(f"{source} links to {target}, which does not exist")
    return f"{repository}/blob/main/{path}"
