"""The Flower `ClientApp` of this project, named in `pyproject.toml`: the device's side of a round.

The process of a SuperNode serves one device, so it keeps in memory only what that device has not cut.
"""

from functools import partial

from fedspine import client_round
from fedspine.flower.client_app import make_client_app, require_same_root

require_same_root(__file__)
app = make_client_app(
    partial(client_round.train, own=True), client_round.probe, partial(client_round.evaluate_device, own=True)
)
