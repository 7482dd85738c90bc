"""Training at length: one loop for continued pretraining and SFT, sharded, offloaded, resumed bit for bit.

`ultralong.training.loop.train` runs what a `ultralong.training.config.TrainConfig` says.
"""
