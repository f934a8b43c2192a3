"""Reduced images for vLLM: a client of its server, prompts for its offline engine, and a plug-in for its processes.

tokenprune encodes and reduces images in its own environment (`VisionEncoder`), and vLLM runs the LLM in another one,
because their versions of transformers differ. The plug-in and `load_prompts` also run in the environment of vLLM.
Importing this package loads neither torch nor vLLM nor transformers.
"""

from tokenprune.experiments.integrations.vllm.client import ServerError, build_content, chat, post_chat
from tokenprune.experiments.integrations.vllm.offline import load_prompts

__all__ = ["ServerError", "build_content", "chat", "load_prompts", "post_chat"]
