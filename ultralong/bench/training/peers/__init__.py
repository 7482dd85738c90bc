"""Training by other projects, each as its own guide sets it up: `ultralong bench train MODEL --gpus 2 --peers`.

| peer | what runs | packages beside this project's |
|---|---|---|
| torch-cp-flash, torch-cp-cudnn | accelerate's context parallelism (torch's, keys gathered) over FSDP2 | none |
| trl-sft-cp | TRL's `SFTTrainer` over the same, with its loss in chunks | trl, datasets |
| deepspeed-alst | DeepSpeed's ALST: Ulysses, ZeRO-3, tiled feed-forward layers and loss | deepspeed |
| deepspeed-alst-offload | the same, checkpointed hidden states in host memory (DeepSpeed's own manager) | deepspeed |
| deepspeed-alst-offload-all | the same, and AdamW with its states in host memory (ZeRO-Offload) | deepspeed |
| torchtitan-cp | torchtitan's own trainer and Llama, compiled, every layer recomputed | torchtitan==0.2.2 |

A machine with a package index: `pip install deepspeed trl datasets torchtitan==0.2.2`. torchtitan 0.3.0 needs a
later torch than 2.11 (its import stops at `DataParallelMeshDims`); 0.2.2 imports with 2.11. For a machine without an
index, make an archive beside one (for that machine's Python and platform; torch and what came with it are left out):

    pip download --dest wheels --python-version 3.12 --platform manylinux_2_28_x86_64 --platform any \
        --only-binary :all: --no-deps PACKAGES
    for wheel in wheels/*.whl; do unzip -qo "$wheel" -d site; done; tar czf site.tar.gz site

Unpack it there: `PYTHONPATH=site ultralong bench train ...`. PACKAGES are a peer's own and what they need (`pip
install --dry-run` lists them): beside torch, transformers, accelerate, pyarrow (24 or later) and this project's own
they were trl, datasets, dill, multiprocess, torchtitan==0.2.2, torchdata, tomli, deepspeed, hjson, pydantic,
pydantic-core, annotated-types and typing-inspection, 31 MB in all, for torch 2.11 on Python 3.12 in November 2026.
DeepSpeed comes as source, pure Python unless its operators are asked for: `pip wheel --no-deps --no-build-isolation
--wheel-dir wheels deepspeed`, with torch installed. On 2026-11-30 the newest releases were trl 1.16.0, accelerate
1.15.0, deepspeed 0.19.8 and torchtitan 0.3.0.

NeMo Automodel 0.7.0 is not among the peers. It installs beside torch 2.11 (with transformers 5.18.0, which it pins),
but its packed context parallelism needs Transformer Engine 2.19 or later, whose library asks cuBLAS for
`cublasLtGroupedMatrixLayoutInit_internal`: the cuBLAS that torch 2.11 pins has it not. What was tried, and its
messages: `peers_not_run` in notebooks/results/training_sharded_h200.json.

A peer's steps come behind two on a short row, as the trainer's own do; ALST with offload and torchtitan, which pin or
compile for one length, behind one on a whole row.
"""
