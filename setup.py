"""Package build. Metadata lives in pyproject.toml; this file is where csrc/ is compiled once it holds kernels."""

from setuptools import setup

setup()
