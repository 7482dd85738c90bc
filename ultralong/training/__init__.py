"""Training at length: one loop for continued pretraining and SFT, sharded, offloaded, resumed to the bit.

`ultralong.training.loop.train` runs what a `ultralong.training.config.TrainConfig` says.
"""
