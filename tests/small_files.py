"""A limit of the system on the size of files, in a process of its own: in pytest's it would meet what pytest writes."""

import os
import pickle
import resource


def error_under_limit(size, work):
    """Run ``work`` in a forked process that cannot write files larger than ``size`` bytes.

    Returns:
        The ValueError that it ended with, None if it ended well; any other error is raised here.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ended = None
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            work()
        except BaseException as error:
            ended = isinstance(error, ValueError), str(error) or type(error).__name__
        os.write(writing, pickle.dumps(ended))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        ended = pickle.loads(answers.read())
    os.waitpid(child, 0)
    if ended is None:
        return None
    is_mistake, text = ended
    if not is_mistake:
        raise RuntimeError(text)
    return ValueError(text)
