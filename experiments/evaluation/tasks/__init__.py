"""Tasks, which provide images, questions and accepted answers, and score the predictions."""

from tokenprune.experiments.evaluation.tasks.base import Sample, Task, tasks
from tokenprune.experiments.evaluation.tasks.boards import Boards
from tokenprune.experiments.evaluation.tasks.folder import Folder
from tokenprune.experiments.evaluation.tasks.lmms_eval import LmmsTask
from tokenprune.experiments.evaluation.tasks.pages import Pages

__all__ = ["Boards", "Folder", "LmmsTask", "Pages", "Sample", "Task", "tasks"]
