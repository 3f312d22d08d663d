"""The tasks of ``vllm-duo eval``, one file each; a new one is a file and a line here."""

from __future__ import annotations

from vllm_duo.evaluate.task import Task
from vllm_duo.evaluate.tasks import (
    arithmetic,
    common_words,
    copying,
    multi_key,
    multi_turn,
    multi_value,
    needle,
    variable_tracking,
)

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        needle,
        multi_key,
        multi_value,
        variable_tracking,
        common_words,
        multi_turn,
        copying,
        arithmetic,
    )
}
