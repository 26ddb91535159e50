"""What is asked in each exercise: functions easy to hard, what they are worth, and their hints.

Every function has three hints: where to look, how to go about it, and nearly the code. This table
is the only place that knows the functions; `python exercise.py --check` compares it with the
modules and with the graded tests.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """One body to write."""

    function: str  # a function of the module, or Class.method
    points: int
    hints: tuple[str, str, str]


class Exercise(NamedTuple):
    """The bodies to write in one module, in an order in which each needs only those before it."""

    minutes: int  # for somebody who has read the module's docstring and those above it
    idea: str
    tasks: tuple[Task, ...]

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)


EXERCISES = {
    "masks": Exercise(
        45,
        "who may attend to whom",
        (
            Task(
                "block_of_frame",
                2,
                (
                    "One integer division, and the prefix apart.",
                    "Count the frames behind the prefix; every `step` of them is one block more. "
                    "Inside the prefix the answer is 0, for numbers and for tensors alike.",
                    "1 + (frame - prefix) // step is right from the prefix on; multiply it by "
                    "(frame >= prefix).",
                ),
            ),
            Task(
                "video_token_blocks",
                1,
                (
                    "`frame_blocks` knows the block of every frame; a frame has many tokens.",
                    "Tokens are frame-major: all tokens of frame 0, then all of frame 1. So every "
                    "frame's block is repeated in place.",
                    "frame_blocks(blocks, cfg)[0], then repeat_interleave by cfg.tokens_per_frame; "
                    "`repeat` would put the frames one after another again and again.",
                ),
            ),
            Task(
                "audio_token_blocks",
                1,
                (
                    "An audio frame is one token; what stands in front of them?",
                    "The S sinks come first and belong to block 0, unless sinks=False.",
                    "torch.cat of cfg.num_sinks zeros (in the same dtype: new_zeros) and "
                    "frame_blocks(blocks, cfg)[1].",
                ),
            ),
            Task(
                "may_attend",
                4,
                (
                    "Compare blocks, not tokens: make a column of queries and a row of keys.",
                    "A key is visible if its block is not later than the query's; with a window, "
                    "also not more than `window` blocks earlier, or else in a pinned block 0.",
                    "q, k = query_blocks[:, None], key_blocks[None, :]; k <= q; and with a window "
                    "(k >= q - window) | ((k == 0) & pinned).",
                ),
            ),
            Task(
                "four_masks",
                2,
                (
                    "A site is named listener last: in a2v, who asks and who is asked?",
                    "Take the blocks of all video tokens and of all audio tokens once; each mask "
                    "is may_attend(blocks of the queries, blocks of the keys, window).",
                    "a2v is video asking audio: may_attend(video, audio, window), with a row per "
                    "video token; v2a is the other way round.",
                ),
            ),
        ),
    ),
}
