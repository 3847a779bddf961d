"""Which (pruning ratio, LoRA rank) for which device: policies, reward, schedule. No torch, no Flower."""
