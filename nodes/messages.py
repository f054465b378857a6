"""Messages for the user: in the log and under a node."""

import html
import logging
import sys

from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context


def show(sentence: str, level: int = logging.INFO) -> None:
    """Write a sentence to the log and under the running node."""
    logging.log(level, "ZTSNR: %s", sentence)
    context = get_executing_context()
    # ComfyUI's server, if there is one: the nodes also run in programs that only import ComfyUI
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if context is not None and server is not None:
        # the page reads it as HTML, and sentences may quote text from a stranger's file
        server.send_progress_text(html.escape(sentence, quote=False), context.node_id, server.client_id)


def refused(reason: Exception, outputs: int) -> io.NodeOutput:
    """Outputs that stop only what depends on this node, and show the reason."""
    sentence = str(reason)
    show(sentence, logging.ERROR)
    return io.NodeOutput(*[None] * outputs, ui=ui.PreviewText(sentence), block_execution=sentence)
