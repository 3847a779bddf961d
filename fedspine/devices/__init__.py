"""The simulated devices: their catalogue and the virtual clock. No torch, no Flower."""
