"""What a server serves, and to whom."""

from __future__ import annotations

from dataclasses import dataclass

from ultralong.data.chat.transport import is_this_machine, read_key
from ultralong.utils.units import Tokens
from ultralong.utils.words import check_variable

# Of `ultralong.inference.decode_step.exchange`, which needs torch.
EXCHANGES = ("auto", "direct", "gather", "symmetric")


@dataclass(frozen=True)
class ServeSettings:
    """A server of one model.

    Attributes:
        model: Folder, hub id or miniature.
        host: Address to listen on. Any but this machine's own needs `key_variable`.
        port: Port to listen on; 0 takes a free one.
        name: Name of the model in requests and answers; by default the folder's, with the run's in front where that is
            `model`: cpt/model for runs/cpt/model.
        key_variable: Environment variable that holds the API key which requests must carry.
        gpus: GPUs that share a prompt; each holds the whole model and its part of the cache.
        kv: Type of keys and values: auto, or fp8, which takes half the memory and rounds them to 8 bits.
        exchange: How several GPUs join their attention of a new token: direct (each sends to each), gather (NCCL's
            all-gather), symmetric (each reads the others' memory, the fastest, on GPUs of one host), or auto, which is
            symmetric where all of them can, else direct; the log says which.
        chunk: Tokens of one prefill pass, after each of which a cancelled request ends; by default 16,384, or 65,536 a
            GPU with `gpus` or `kv`.
        max_tokens: Most tokens of a prompt and its answer; by default the model's window, or what the GPU's memory
            allows where that is less.
        batch: Short requests that are answered together, each as it would be alone; 1 answers one at a time, as do
            several GPUs, 8-bit keys and values, and models with special layers.
        batch_tokens: Most tokens of a short request and its answer.
        answer_tokens: Most tokens of an answer, where a request does not say.
        queue: Requests that may wait; one more is refused.
        grace: Seconds that answers have to end when the server is told to stop (SIGTERM, Ctrl-C); what has not ended
            then, or waits, is refused with status 503.
        body_mib: Largest request in MiB.
        device: auto, cpu or cuda.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    key_variable: str | None = None
    gpus: int = 1
    kv: str = "auto"
    exchange: str = "auto"
    chunk: Tokens | None = None
    max_tokens: Tokens | None = None
    batch: int = 16
    batch_tokens: Tokens = 4096
    answer_tokens: Tokens = 1024
    queue: int = 64
    grace: int = 5
    body_mib: int = 64
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.kv not in ("auto", "fp8"):
            raise ValueError(f"kv must be auto or fp8, found {self.kv!r}.")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange takes {', '.join(EXCHANGES)}, found {self.exchange!r}.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, found {self.port}.")
        for field in ("gpus", "batch", "batch_tokens", "answer_tokens", "queue", "body_mib"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, found {getattr(self, field)}.")
        if self.grace < 0:
            raise ValueError(f"grace must be 0 or more, found {self.grace}.")
        for field in ("chunk", "max_tokens"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, found {getattr(self, field)}.")
        check_variable(self.key_variable)
        if self.key_variable is None and not is_this_machine(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and no key protects it: put a key into an "
                "environment variable and name it with --key-variable, or keep --host 127.0.0.1."
            )

    def key(self) -> str | None:
        """The API key, or None where none is asked for.

        Raises:
            ValueError: The variable is not set, holds nothing, or what no client can send.
        """
        return read_key(self.key_variable)
