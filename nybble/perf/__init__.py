"""Where the time goes: machines, rooflines, measured steps and kernels, their explanation, and advice."""
