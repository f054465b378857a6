"""CFG++ (Chung et al., arXiv 2406.08070): guidance moves the denoised picture, and the noise stays unconditional.

Where classifier-free guidance takes x0 and eps from the guided prediction, a DDIM step of CFG++ is

    x_next = alpha_next x0_guided + s_next eps        with eps = (x - alpha x0_unconditional) / s

That is DDIM's own step with x0_guided, from the state

    x' = alpha x0_guided + s eps = x + alpha (x0_guided - x0_unconditional)

So CFG++ edits the state before a step, as inpainting does, and every solver keeps such an edit: multistep and corrector
weights apply to x0 alone, a second evaluation only looks ahead from x', and stochastic solvers keep a share of eps and
draw the rest anew.  (lcm keeps none of it, so there CFG++ is ordinary guidance.)  At infinity alpha is 0, and the first
step is that of ordinary guidance.

With exposure-true guidance the unconditional prediction, too, is the one with the prompt's exposure, cond - T(cond -
uncond) (``exposure_true``).  With any other one each step would add the brightness that guidance was kept from adding.

The edit is made once a step, whatever the step's length: the same scale guides more strongly in more steps.
"""

import torch

from .prediction import alpha_s


def cfg_pp_state(x: torch.Tensor, sigma: float, guided: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
    """The state x' from which a solver's step with the guided x0 is one of CFG++.

    Args:
        x: (B, C, H, W) variance-preserving state at noise level sigma, inf allowed.
        guided, unconditional: (B, C, H, W) x0 predicted for x, in any floating dtype.

    Returns:
        (B, C, H, W) in the dtype of x.
    """
    return torch.add(x, guided.to(x.dtype) - unconditional.to(x.dtype), alpha=alpha_s(sigma)[0])
