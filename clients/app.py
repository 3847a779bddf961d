"""The Flower `ClientApp` of this project, named in `pyproject.toml`: the device's side of a round."""

from fedspine.flower.client_app import require_same_root
from fedspine.flower.deployed import client_app as app

require_same_root(__file__)
__all__ = ["app"]
