"""FedSpine: federated pruning and LoRA tuning of language models on weak, unequal devices."""

__version__ = "0.1.0"
