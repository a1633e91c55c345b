from .solvers import Solver  # noqa: F401
