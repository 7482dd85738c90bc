"""Start the server: open the model, find out how long prompts may be, listen."""

from __future__ import annotations

import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ultralong.inference.batched import cache_bytes
from ultralong.inference.continuous import ContinuousBatch
from ultralong.inference.engines import LocalEngine, RunnerEngine
from ultralong.inference.server.metrics import Metrics
from ultralong.inference.server.settings import ServeSettings
from ultralong.inference.server.worker import Worker
from ultralong.inference.sharded_engine import with_model
from ultralong.rope.config import declared_window
from ultralong.utils.extras import require
from ultralong.utils.hub import folder_name, local_folder
from ultralong.utils.processes import SERVICE_STOPS

CHUNK = 16384  # tokens of a prefill pass: what a cancelled request waits for
SHARE = 0.8  # of the free memory for keys and values; activations of a chunk take some of the rest
BATCH_SHARE = 0.1  # of that memory for rows of short requests, at most


def serve(settings: ServeSettings, ready: Callable[[Any], None] | None = None) -> None:
    """Serve a model until the process is told to stop.

    Args:
        settings: What is served, and where.
        ready: Called with the `uvicorn.Server` before it listens; its `should_exit` stops it.

    Raises:
        ValueError: No such checkpoint or device, no key in the variable, or more tokens than the model can read.
        ImportError: A package of the extra `serve` is missing.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")
    settings.key()  # what can't be served is told before the model is loaded
    listening(settings).close()
    check_window(settings)
    with_model(
        Serving(settings, ready),
        settings.model,
        gpus=settings.gpus,
        kv=settings.kv,
        chunk=settings.chunk,
        device=settings.device,
        quiet=True,
        exchange=settings.exchange,
        first_stops=True,
    )


class Serving:
    """What the first process does with an open model: answers requests until it is told to stop.

    Args:
        settings: What is served, and where.
        ready: Called with the `uvicorn.Server` before it listens; its `should_exit` stops it.
    """

    def __init__(self, settings: ServeSettings, ready: Callable[[Any], None] | None) -> None:
        self._settings, self._ready = settings, ready

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Any) -> None:
        """Serve the model; the engine is None where the plain one answers."""
        import uvicorn

        from ultralong.inference.server.app import make_app
        from ultralong.inference.server.connections import Connection, Server, claim_files

        settings = self._settings
        if engine is None:
            engine = LocalEngine(model, tokenizer, chunk=settings.chunk or CHUNK, fused=True)
        batch = short_batch(engine, settings)
        limit = most_tokens(engine, settings, batch_bytes(batch))
        worker = Worker(engine, limit, settings.queue, Metrics(), batch)
        folder = Path(settings.model)
        name = settings.name or (folder_name(folder.resolve()) if folder.exists() else settings.model)
        app = make_app(
            worker,
            name,
            key=settings.key(),
            answer_tokens=settings.answer_tokens,
            body_bytes=settings.body_mib * 2**20,
        )
        Connection.most, backlog = claim_files()
        config = uvicorn.Config(app, http=Connection, log_level="warning", backlog=backlog)
        server = Server(config, worker, settings.grace)
        worker.start()
        # What is here by now stays. The garbage collector would look through its 400,000 objects every now and then,
        # which stops all threads for a third of a second.
        gc.collect()
        gc.freeze()
        try:
            with listening(settings) as listener:
                print(
                    f"Serving {name} at http://{settings.host}:{listener.getsockname()[1]}/v1: prompt and answer up "
                    f"to {limit:,} tokens together. Ctrl-C stops it.",
                    flush=True,
                )
                if self._ready is not None:
                    self._ready(server)
                with outlived_stops(server) if engine.ranks > 1 else nullcontext():
                    server.run(sockets=[listener])
        finally:
            gc.unfreeze()
            worker.stop()


@contextmanager
def outlived_stops(server: Any) -> Iterator[None]:
    """End no more than the server by SIGTERM and SIGINT, as other ranks wait for what this one tells them then.

    uvicorn sends itself a signal that has stopped it once more when it has set the handlers back that were there.
    """

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in SERVICE_STOPS if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening(settings: ServeSettings) -> socket.socket:
    """The socket that the server listens on.

    Raises:
        ValueError: The port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ValueError(
            f"Nothing can listen on {settings.host}, port {settings.port}: {error.strerror}. Give another --port, "
            "or --port 0 for a free one."
        ) from error


def short_batch(engine: RunnerEngine, settings: ServeSettings) -> ContinuousBatch | None:
    """Rows for short requests, as many as were asked for and as a tenth of a GPU's free memory holds; None for none."""
    rows, model = settings.batch, engine.model
    tokens = min(settings.batch_tokens, declared_window(model.config.get_text_config()))
    if not isinstance(engine, LocalEngine):
        return None
    if model.device.type == "cuda":
        free = SHARE * BATCH_SHARE * torch.cuda.mem_get_info(model.device)[0]
        rows = min(rows, int(free / (tokens * cache_bytes(model))))
    if rows < 2:
        return None
    try:
        return ContinuousBatch(model, rows, tokens)
    except ValueError:  # special layers, or frequencies that follow the length
        return None


def batch_bytes(batch: ContinuousBatch | None) -> int:
    """Memory that the rows of short requests take when the first of them come."""
    return 0 if batch is None else batch.rows * batch.capacity * cache_bytes(batch.model)


def check_window(settings: ServeSettings) -> None:
    """See that no more tokens are asked for than a model that is here can read; no weight is read.

    Raises:
        ValueError: They are more.
    """
    folder = local_folder(settings.model)
    if settings.max_tokens is None or not (folder / CONFIG_NAME).is_file():
        return
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, StrictDataclassError):
        return  # loading the model says what is wrong with it
    _check_tokens(settings, config)


def most_tokens(engine: RunnerEngine, settings: ServeSettings, taken: int = 0) -> int:
    """Most tokens of a prompt and its answer: the model's window, or what the GPU's free memory holds beside `taken`.

    Raises:
        ValueError: More were asked for.
    """
    window = _check_tokens(settings, engine.model.config)
    wanted = settings.max_tokens or window
    if engine.model.device.type != "cuda":
        return wanted
    each = cache_bytes(engine.model) / (settings.gpus * (2 if settings.kv == "fp8" else 1))
    held = int((SHARE * torch.cuda.mem_get_info(engine.model.device)[0] - taken) / each)
    if settings.max_tokens is not None and held < settings.max_tokens:
        raise ValueError(
            f"max_tokens is {settings.max_tokens:,}, and the free GPU memory holds keys and values of about {held:,}: "
            "use more --gpus, --kv fp8, or lower it."
        )
    return min(wanted, held)


def _check_tokens(settings: ServeSettings, config: PreTrainedConfig) -> int:
    """The window of a model with a config, which must hold what is asked for."""
    window = declared_window(config.get_text_config())
    if settings.max_tokens is not None and settings.max_tokens > window:
        raise ValueError(
            f"max_tokens is {settings.max_tokens:,}, and the model's window is {window:,}: extend it first "
            "(ultralong extend)."
        )
    return window
