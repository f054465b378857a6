"""What the tests of whole runs share."""

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny SDXL and pictures, for ``tiny_run.make_content``."""
    from ..tiny_pipelines import make_tiny_sdxl
    from .tiny_run import write_pictures

    folder = tmp_path_factory.mktemp("place")
    make_tiny_sdxl(folder / "tiny", prediction_type="epsilon", zero_snr=False)
    write_pictures(folder / "pictures")
    return folder
