"""The suite `tpp`: denoise steps and decoder over several devices, simulated or measured."""
