"""Everything that touches Flower: records, apps, exchange and engines. No other package imports flwr."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read by flwr when it is first imported
