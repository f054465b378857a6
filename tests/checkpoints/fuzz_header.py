"""Coverage-guided fuzzing of header parsing; the suite only replays the corpus that it left.

    pip install atheris
    python tests/checkpoints/fuzz_header.py tests/checkpoints/corpus -max_total_time=600

An input is the size of the data, in 4 bytes, and then the header.  It must be read, or refused in a sentence; what is
read must be read by the safetensors library too, and hold the same tensors.
"""

import struct
import sys

import safetensors

MOST_DATA = 1 << 12  # bytes that are really made for the library


def check(content: bytes) -> None:
    """One input: a header or a sentence, and the library's agreement."""
    from ztsnr.checkpoints.header import parse_header

    if len(content) < 4:
        return
    (data_size,), text = struct.unpack("<I", content[:4]), content[4:]
    header, refusal = None, None
    try:
        header = parse_header(text, data_size)
    except ValueError as error:
        refusal = str(error)
    if header is None:
        assert 0 < len(refusal) < 300
        assert "\n" not in refusal
        return
    assert sum(tensor.nbytes for tensor in header.tensors.values()) == data_size
    if data_size <= MOST_DATA:
        whole = struct.pack("<Q", len(text)) + text + bytes(data_size)
        theirs = dict(safetensors.deserialize(whole))
        assert theirs.keys() == header.tensors.keys()
        for name, tensor in header.tensors.items():
            assert tuple(theirs[name]["shape"]) == tensor.shape
            assert theirs[name]["dtype"] == tensor.dtype


if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["ztsnr.checkpoints.header"]):
        import ztsnr.checkpoints.header  # noqa: F401

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
