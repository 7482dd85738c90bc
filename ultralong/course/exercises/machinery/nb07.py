"""Exercises of 07_memory_and_the_trainer."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.machinery.nb07_checks import (
    STEP,
    check_keep,
    check_longest,
    check_scale,
    check_states,
    check_tiled_loss,
    keep,
    longest,
    scale,
    state_bytes,
    states_no_gradients,
    states_no_scales,
    states_one_moment,
    tiled_all_tokens,
    tiled_loss,
    tiled_mean_of_means,
    tiled_no_rest,
    tiled_not_at_all,
)

EXERCISES = (
    Exercise(
        name="07.states",
        title="Bytes of parameters, gradients and states",
        task=(
            "Write `state_bytes(parameters, gpus, eight_bit)`: bytes on each GPU of float32 parameters, float32 "
            "gradients and AdamW's two states, all sharded over the GPUs. States are float32, or 8 bits in blocks of "
            "256 with a float32 scale each."
        ),
        check=check_states,
        solution=state_bytes,
        mistakes=(
            Mistake("not sharded", lambda n, g, e: state_bytes(n, 1, e), "FSDP shards all three"),
            Mistake("no gradients", states_no_gradients, "gradients are missing"),
            Mistake("one state", states_one_moment, "two states"),
            Mistake("no scales", states_no_scales, "scale for each block"),
        ),
        hints=("A float32 has 4 bytes. How many numbers belong to a parameter?", "8 bits: 1 byte + 4/256 a value."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="07.tiled_loss",
        title="The loss without all logits",
        task=(
            "Write `tiled_loss(hidden, weight, labels, tile)`: hidden (N, d), weight (V, d), labels (N,) with -100 for "
            "no target. Give the mean cross entropy over all targets, with the logits of `tile` tokens at a time."
        ),
        check=check_tiled_loss,
        solution=tiled_loss,
        mistakes=(
            Mistake("mean of means", tiled_mean_of_means, "has no mean, 0 / 0"),
            Mistake(
                "mean of the means of tiles with targets",
                lambda h, w, y, t: tiled_mean_of_means(h[y != -100], w, y[y != -100], t),
                "mean of tile means",
            ),
            Mistake("all tokens", tiled_all_tokens, "-100 is none"),
            Mistake("drops the rest", tiled_no_rest, "yours drops them"),
            Mistake("all logits", tiled_not_at_all, "the logits of all tokens"),
        ),
        hints=(
            'torch.nn.functional.cross_entropy(..., reduction="sum") adds up and leaves -100 out.',
            "Divide once, at the end, by the number of labels that are not -100.",
        ),
        minutes=8,
    ),
    Exercise(
        name="07.keep",
        title="What stays, what leaves",
        task=(
            "Llama-3.1-8B, rows of 1,048,576 tokens, two GPUs of 139.8 GiB, 128 GiB of host memory for each. Give a "
            "dict with attention_outputs_on_gpu, attention_outputs_offloaded, layer_inputs_offloaded (layers, of 32; "
            "-1 is all) and checkpoint_every, so that it fits and a step takes 880 s or less. The planner judges."
        ),
        check=check_keep,
        solution=keep(4, 28, 0, 3),
        mistakes=(
            Mistake("all on the GPU", keep(-1, 0, 0, 1), "GPU memory:"),
            Mistake("all on the host", keep(0, -1, -1, 1), "Host memory:"),
            Mistake("attention again", keep(0, 0, 0, 2), "computed again"),
            Mistake("another key", {"attention_kept": 4}, "Give a dict with the keys"),
        ),
        hints=(
            "An input and an attention output of one layer are 4 GiB each on each of two GPUs.",
            "28 outputs fill 112 GiB of the host. Which 4 stay on the GPU does the trainer choose: the last ones.",
            "Inputs can be computed again from an earlier input and the outputs: checkpoint_every=3 keeps 11 of 32.",
        ),
        difficulty="hard",
        minutes=12,
    ),
    Exercise(
        name="07.longest",
        title="The longest row",
        task=(
            "Write `longest(fixed, per_token, budget, ranks)`: a GPU holds `fixed` bytes whatever the row, and "
            "`per_token` bytes for each of its tokens. Give the longest row that the ranks can share; each holds a "
            "multiple of 1,024 tokens."
        ),
        check=check_longest,
        solution=longest,
        mistakes=(
            Mistake("no fixed part", lambda f, t, b, p: int(b / t) // STEP * STEP * p, "whole budget to tokens"),
            Mistake("one rank", lambda f, t, b, p: longest(f, t, b, 1), "share the row"),
            Mistake("rounds up", lambda f, t, b, p: -(-int((b - f) / t) // STEP) * STEP * p, "Round down"),
            Mistake("below zero", lambda f, t, b, p: int((b - f) / t // STEP) * STEP * p, "no row fits"),
        ),
        hints=("What is left after the fixed part belongs to tokens.", "Round down on one GPU, then times the ranks."),
        difficulty="easy",
        minutes=5,
    ),
    Exercise(
        name="07.scale",
        title="The scale of a loss under several ranks",
        task=(
            "Write `scale(targets, rank)`: `targets` has each rank's number of targets. Each rank multiplies its "
            "*summed* loss by your factor; the gradients are then averaged over the ranks. The result has to be the "
            "gradient of the mean over all targets."
        ),
        check=check_scale,
        solution=scale,
        mistakes=(
            Mistake("own targets", lambda n, r: 1 / n[r], "mean of means"),
            Mistake("all targets", lambda n, r: 1 / sum(n), "divides once more"),
            Mistake("ranks twice", lambda n, r: len(n) ** 2 / sum(n), "times too large"),
            Mistake("largest rank", lambda n, r: 1 / max(n), "Count targets of all"),
        ),
        hints=("The gradient of the mean is the sum of all gradients over all targets.", "What undoes the average?"),
        minutes=6,
    ),
)
