import numpy as np
def spectral_sigmas(steps, canvas, sigma_start, sigma_min, sigma_max):
    return np.geomspace(sigma_start or 4 * canvas, 0.045, steps)
