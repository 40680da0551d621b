"""What can be chosen: one Hydra group a folder. Hydra finds these files as `pkg://reelm.conf`."""
