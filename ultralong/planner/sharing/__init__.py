"""How rows are shared over GPUs where the config says auto: what each way takes, and which is taken."""
