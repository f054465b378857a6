"""What is published: the source distribution, the pages that PyPI and the Comfy registry show, who owns it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

import ztsnr

ROOT = Path(__file__).resolve().parent.parent
NOT_PUBLISHED = shutil.ignore_patterns(
    ".git*", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "ztsnr_*", ".coverage*"
)
PLACEHOLDER = "OWNER"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = script("release")


@pytest.fixture
def checkout(tmp_path):
    """The files that a release changes or reads, with an owner and a section in the changelog."""
    for name in ("README.md", "pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    edit(tmp_path / "pyproject.toml", f"/{PLACEHOLDER}/", "/somebody/")
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def settings(folder=ROOT):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!https?:)""", text), "only Markdown's links are made absolute"
    for path, anchor in release.RELATIVE.findall(text):
        target = page.parent / path
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{path}{anchor}"


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_made_absolute():
    text = "![a](docs/a.png) [b](docs/b.md#c), [d](#d) [e](https://e.org/f.png) [![g](g.jpg)](mailto:h)"
    assert release.with_absolute_links(text, "https://github.com/me/it", "v1") == (
        "![a](https://raw.githubusercontent.com/me/it/v1/docs/a.png) "
        "[b](https://github.com/me/it/blob/v1/docs/b.md#c), "
        "[d](#d) [e](https://e.org/f.png) [![g](https://raw.githubusercontent.com/me/it/v1/g.jpg)](mailto:h)"
    )


def test_a_release_says_where_it_is_from(checkout):
    release.prepare(checkout, f"v{ztsnr.__version__}")
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    assert not release.RELATIVE.search(readme)
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("](https://raw.githubusercontent.com/somebody/") == len(
        re.findall(r"!\[[^\]]*\]\(docs/", before)
    )
    here = f"https://github.com/somebody/comfyui-ztsnr/blob/v{ztsnr.__version__}"
    said = settings(checkout)
    assert said["project"]["urls"] == {
        "Repository": "https://github.com/somebody/comfyui-ztsnr",
        "Documentation": f"{here}/README.md",
        "Changelog": f"{here}/CHANGELOG.md",
        "Issues": "https://github.com/somebody/comfyui-ztsnr/issues",
    }
    assert said["tool"]["comfy"]["Icon"].startswith("https://raw.githubusercontent.com/somebody/comfyui-ztsnr/v")
    del said["project"]["urls"], said["tool"]["comfy"]["Icon"]
    rest = settings()
    del rest["project"]["urls"], rest["tool"]["comfy"]["Icon"]
    assert said == rest


def test_releases_that_are_not_ready(checkout):
    version = ztsnr.__version__
    with pytest.raises(SystemExit, match=r"the tag is v9\.9\.9 and pyproject"):
        release.prepare(checkout, "v9.9.9")
    edit(checkout / "CHANGELOG.md", f"\n## {version}\n", "\n## Unreleased\n")
    with pytest.raises(SystemExit, match=re.escape(f"no section for {version}")):
        release.prepare(checkout, f"v{version}")
    edit(checkout / "pyproject.toml", "/somebody/", f"/{PLACEHOLDER}/")
    with pytest.raises(SystemExit, match=f"still says {PLACEHOLDER}"):
        release.prepare(checkout, f"v{version}")


# ----------------------------------------------------------------------------------------------------------------------
# What it says about itself


def test_the_owner_is_named_in_one_place():
    """Which is a placeholder until there is one; every other address is made of it."""
    repository = settings()["project"]["urls"]["Repository"]
    owner = re.fullmatch(r"https://github\.com/([\w-]+)/comfyui-ztsnr", repository)[1]
    pages = [*ROOT.glob("*.*"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.*"), *ROOT.glob("web/**/*.*")]
    texts = {path: path.read_text(encoding="utf-8") for path in pages if path.is_file() and path.suffix != ".lock"}
    found = [path.name for path, text in texts.items() for _ in re.findall(rf"\b{owner}/comfyui-ztsnr\b", text)]
    assert found == ["pyproject.toml"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert settings()["project"]["version"] == citation["version"] == ztsnr.__version__
    assert citation["license"] == settings()["project"]["license"]


def test_the_icon_is_what_the_registry_takes():
    path = ROOT / settings()["tool"]["comfy"]["Icon"]
    with Image.open(path) as icon:
        assert icon.width == icon.height <= 400
        assert icon.size == script("icon").draw().size
    assert path.stat().st_size < 20_000


def test_workflows():
    test, publish = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()) for name in ("test", "publish")
    )
    for job, script in (("test", ".ci/run"), ("lowest", ".ci/lowest")):
        assert any(step.get("run") == script for step in test["jobs"][job]["steps"])
        assert os.access(ROOT / script, os.X_OK)
    on = publish[True]  # which YAML takes "on" for
    assert on == {"push": {"tags": ["v*"]}}
    for job in ("build", "comfy-registry"):  # both show README and pyproject.toml
        assert any(".ci/release.py" in step.get("run", "") for step in publish["jobs"][job]["steps"])
    for job in ("pypi", "comfy-registry"):
        assert set(publish["jobs"][job]["needs"]) == {"test", "build"}


# ----------------------------------------------------------------------------------------------------------------------
# Lower bounds


def test_lowest_versions_are_the_lower_bounds():
    """Of all extras together, but for the one for tests inside ComfyUI, which is pinned."""
    groups = settings()["project"]["optional-dependencies"]
    requirements = [Requirement(text) for name, group in groups.items() if name != "comfyui" for text in group]
    bounds = {}
    for requirement in requirements:
        if requirement.name != settings()["project"]["name"]:
            (bound,) = requirement.specifier
            assert bound.operator == ">=", requirement
            version = Version(bound.version)
            bounds[requirement.name] = max(version, bounds.get(requirement.name, version))
    lines = (ROOT / "lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in lowest.items()} == bounds


def test_tested_versions_are_within_the_bounds():
    """constraints.txt has a version for everything in lowest.txt, and none is lower."""
    lowest, tested = (
        {
            canonicalize_name(name): Version(version)
            for line in (ROOT / f"{file}.txt").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
            for name, version in [line.split("==")]
        }
        for file in ("lowest", "constraints")
    )
    assert lowest.keys() - tested.keys() <= {"lpips", "torchvision"}  # which this torch has no build of
    assert all(tested[name] >= lowest[name] for name in lowest.keys() & tested.keys())


# ----------------------------------------------------------------------------------------------------------------------
# The source distribution


def test_the_source_distribution_is_the_repository(tmp_path):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=NOT_PUBLISHED)
    files = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, (setuptools.__version__, done.stderr)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    published = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert files - published == set()
    extra = {path for path in published - files if ".egg-info" not in str(path)}
    assert extra == {Path("PKG-INFO"), Path("setup.cfg")}

    # a few of its tests, on its own code
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "ztsnr").symlink_to(unpacked, target_is_directory=True)
    tests = [
        "tests/samplers/test_noise_schedule.py",
        "tests/checkpoints/test_fuzz_corpus.py",
    ]
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests],
        cwd=unpacked,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    where = [sys.executable, "-c", "import ztsnr; print(ztsnr.__file__)"]
    assert str(tmp_path / "path") in subprocess.check_output(where, env=os.environ | {"PYTHONPATH": path}, text=True)
