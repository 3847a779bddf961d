"""The Flower `ClientApp` of this project, named in `pyproject.toml`: the device's side of a round."""

from fedspine import client_round
from fedspine.flower.client_app import make_client_app, require_same_root

require_same_root(__file__)
app = make_client_app(client_round.train, client_round.probe, client_round.evaluate_device)
