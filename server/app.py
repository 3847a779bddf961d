"""The Flower `ServerApp` of this project, named in `pyproject.toml`: the rounds over the devices that joined."""

from fedspine.flower.client_app import require_same_root
from fedspine.flower.deployed import server_app as app

require_same_root(__file__)
__all__ = ["app"]
