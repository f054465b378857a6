"""All solvers by name.  ``protocol`` says what a solver is, docs/extending.md how to add one.

Importing a file registers its solvers.  A new solver needs nothing here if it stands in one of these files.
"""

from typing import TYPE_CHECKING

# isort: off
# In the order in which menus list the solvers: deterministic ones, then those that draw noise.
from . import spectral_solver  # noqa: F401
from . import flow_solvers  # noqa: F401
from . import sde_solvers  # noqa: F401
from . import er_sde  # noqa: F401
from . import sa_solver  # noqa: F401
from . import consistency  # noqa: F401
# isort: on

from .protocol import solver_names

DEFAULT_SOLVER = "spectral"

if TYPE_CHECKING:
    SOLVERS: tuple[str, ...]


def __getattr__(name: str):
    # made anew at each access, so that it has the solvers that users register
    if name == "SOLVERS":
        return solver_names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
