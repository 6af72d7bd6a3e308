"""The tiny trained-from-scratch setting of the tests of training."""

from tests.training.conftest import workdir  # noqa: F401 - a fixture
