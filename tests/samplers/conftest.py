import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value would have to reach the host: what makes a GPU wait."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS:
            raise AssertionError(f"{name} reads a tensor on the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_reads():
    """A class of context managers in which reading a tensor on the host fails."""
    return NoHostReads
