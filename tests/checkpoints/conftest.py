"""A whole tiny model for the tests of what is loaded."""

import shutil

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A diffusers folder of a tiny v-prediction model with zero terminal SNR; not to be changed."""
    from ..tiny_pipelines import make_tiny_sdxl

    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(tiny, tmp_path / "copy")
