"""LoRA through the `peft` library: small trained matrices beside frozen weights.

`config` holds the settings, `lora` puts the adapters into a model and says what is trained, `export` writes peft's own
folder.
"""
