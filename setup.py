"""The one thing that pyproject.toml cannot say: the native extension, described in build.py."""

from setuptools import setup

setup(cffi_modules=["build.py:native_extension"])
