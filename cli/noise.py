"""Log lines of other libraries that every command would print first, and that its user can do nothing about."""

import logging

# logger: the beginning of the message
NOISE = {
    # its CUDA kernels for other builds of torch; the optimizers here are written in Python
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    # checkpoints quantized by torchao, which nothing here reads
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects.",
    # image processors of models that nothing here loads
    "transformers.utils.import_utils": "`%s` requires torchvision (not installed); falling back to ",
}


class _Silence(logging.Filter):
    """Refuses the messages of NOISE, with or without their arguments filled in."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a message to leave out."""
        start, _, rest = NOISE[record.name].partition("%s")
        message = str(record.msg)
        return not (message.startswith(start) and rest in message)


_SILENCE = _Silence()


def silence_libraries() -> None:
    """Leave out the messages of NOISE, and no others, in this process."""
    for name in NOISE:
        logging.getLogger(name).addFilter(_SILENCE)
