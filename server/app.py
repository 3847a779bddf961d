"""The Flower `ServerApp` of this project, named in `pyproject.toml`: the rounds over the devices that joined."""

from fedspine.flower.client_app import require_same_root
from fedspine.flower.server_app import make_server_app
from fedspine.simulation import run_server

require_same_root(__file__)
app = make_server_app(run_server)
