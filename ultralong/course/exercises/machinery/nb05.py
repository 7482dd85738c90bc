"""Exercises of 05_attention_kernels."""

from __future__ import annotations

from ultralong.course.exercise import Exercise, Mistake
from ultralong.course.exercises.machinery.nb05_checks import (
    backward_no_delta,
    backward_own_lse,
    backward_own_out,
    backward_scores,
    blockwise,
    blockwise_drops_rest,
    blockwise_overflow,
    blockwise_sum_of_softmaxes,
    causal_offset,
    check_backward,
    check_blockwise,
    check_flops,
    check_merge,
    check_offset,
    merge,
    merge_average,
    merge_bf16,
    merge_exp_of_lse,
    merge_forgets_infinite,
    packed_flops,
)
from ultralong.course.exercises.machinery.nb05_run import check_run

EXERCISES = (
    Exercise(
        name="05.merge",
        title="Join two partial softmaxes",
        task=(
            "Write `merge(out, lse, other, other_lse)`: given two partial results over different keys, each "
            "with an output (Q, D) and a log-sum-exp (Q,), return the result over all of the keys, (out, "
            "lse)."
        ),
        check=check_merge,
        solution=merge,
        mistakes=(
            Mistake("exp of lse", merge_exp_of_lse, "overflows"),
            Mistake("forgets -inf", merge_forgets_infinite, "nan"),
            Mistake("mean", merge_average, "share of the softmax's sum"),
            Mistake("in bfloat16", merge_bf16, "float32 or wider"),
        ),
        hints=(
            "The sum of exponentials of both parts is exp(lse) + exp(other_lse). Stay with its logarithm.",
            "joined = torch.logaddexp(lse, other_lse); a part's weight is exp(lse - joined).",
            "What is -inf - -inf? Replace an infinite `joined` by 0 before you subtract.",
        ),
        minutes=10,
    ),
    Exercise(
        name="05.blockwise",
        title="Attention a block of keys at a time",
        task="Write `blockwise(q, k, v, block)`: attention of q (Q, D) over k, v (K, D), `block` keys at a time.",
        check=check_blockwise,
        solution=blockwise,
        mistakes=(
            Mistake("mean of softmaxes", blockwise_sum_of_softmaxes, "don't average them"),
            Mistake("drops the rest", blockwise_drops_rest, "last 3 keys are missing"),
            Mistake("overflow", blockwise_overflow, "relative to the largest score"),
        ),
        hints=(
            "Start with out = 0 and lse = -inf.",
            "Compute a block's pair, then `merge`.",
            "The last block may be short.",
        ),
        minutes=8,
    ),
    Exercise(
        name="05.offset",
        title="Where the causal diagonal lies",
        task=(
            "Write `causal_offset(queries, keys)`: the queries are the last ones of a row of `keys` tokens; "
            "query i sees "
            "the keys up to i + offset."
        ),
        check=check_offset,
        solution=causal_offset,
        mistakes=(
            Mistake("top-left", lambda q, k: 0, "bottom-right"),
            Mistake("one too many", lambda q, k: k - q + 1, "off by one"),
            Mistake("own key left out", lambda q, k: k - q - 1, "its own key"),
        ),
        hints=("Which key is the last query's own?", "Query Q - 1 has to see key K - 1."),
        difficulty="easy",
        minutes=3,
    ),
    Exercise(
        name="05.backward",
        title="Backward from the saved pair",
        task=(
            "Write `backward_scores(q, k, v, lse, out, dout)`: k, v are one block of keys; lse, out belong to "
            "the whole "
            "row. Give the gradient of the block's scaled scores, (Q, block)."
        ),
        check=check_backward,
        solution=backward_scores,
        mistakes=(
            Mistake("the block's own lse", backward_own_lse, "block's own log-sum-exp"),
            Mistake("no delta", backward_no_delta, "subtract sum(dout * out)"),
            Mistake("the block's output", backward_own_out, "not the block's"),
        ),
        hints=(
            "Probabilities come back as exp(scores - lse).",
            "dS = P * (dP - delta), with dP = dout @ v^T and delta = sum(dout * out) of each query.",
        ),
        difficulty="hard",
        minutes=12,
    ),
    Exercise(
        name="05.flops",
        title="The work of a packed row",
        task=(
            "Write `packed_flops(lengths, heads, head_dim)`: FLOPs of causal attention over masked documents, forward "
            "and backward, a product and a sum counted as two, nothing recomputed."
        ),
        check=check_flops,
        solution=packed_flops,
        mistakes=(
            Mistake("whole row", lambda n, h, d: packed_flops([sum(n)], h, d), "whole row's work"),
            Mistake("not causal", lambda n, h, d: 2 * packed_flops(n, h, d), "Twice too many"),
            Mistake("forward only", lambda n, h, d: packed_flops(n, h, d) * 2 // 7, "five products"),
        ),
        hints=(
            "Forward: two products of n x n x D a head, 2 FLOPs each, half of them masked: 2 n^2 H D.",
            "Backward: five products, 2.5 times as much.",
        ),
        minutes=6,
    ),
    Exercise(
        name="05.run",
        title="The kernel and the head chunks of a run",
        task=(
            "Llama-3.1-8B, rows of 524,288 tokens, one GPU of 139.8 GiB. Give the dict "
            '{"kernel": ..., "head_chunks": ...}, two settings of `parallel:`, so that the planned step fits in the '
            "GPU's memory and takes 480 s or less. A kernel is one of flash4, cudnn and flash, for which rates were "
            "recorded, or auto; head_chunks is a number of chunks, or None for all heads at once."
        ),
        check=check_run,
        solution={"kernel": "flash4", "head_chunks": 8},
        mistakes=(
            Mistake("what auto takes", {"kernel": "auto", "head_chunks": 8}, "look at the roofline"),
            Mistake("all heads at once", {"kernel": "flash4", "head_chunks": None}, "All heads go at once"),
            Mistake("two chunks", {"kernel": "flash4", "head_chunks": 2}, "save less than that costs"),
            Mistake("three chunks", {"kernel": "flash4", "head_chunks": 3}, "must be one of [1, 2, 4, 8]"),
            Mistake("no rates", {"kernel": "reference", "head_chunks": 8}, "No rates of the attention kernel"),
            Mistake("another key", {"kernel": "flash4", "chunks": 8}, "Give a dict with the keys"),
        ),
        hints=(
            "The roofline above shows which kernel is fastest at long rows.",
            "The model has 8 kv heads: 1, 2, 4 or 8 chunks split them. Try some and read what the plan says.",
            "Each chunk is copied before the kernel gets it. So two chunks take more memory than one, and only more "
            "than two take less.",
        ),
        minutes=6,
    ),
)
