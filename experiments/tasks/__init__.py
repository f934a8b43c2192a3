"""Tasks: pictures, questions, accepted answers, and how answers are scored."""

from tokenprune.experiments.tasks.base import Sample, Task, tasks
from tokenprune.experiments.tasks.boards import Boards
from tokenprune.experiments.tasks.folder import Folder
from tokenprune.experiments.tasks.lmms import LmmsTask

__all__ = ["Boards", "Folder", "LmmsTask", "Sample", "Task", "tasks"]
