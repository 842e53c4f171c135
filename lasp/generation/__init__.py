"""Generation with carried state: a cache of states and keys, and steps over new tokens."""

from lasp.generation.cache import GenerationCache
from lasp.generation.sampling import GREEDY, Sampling
from lasp.generation.slots import PADDING
from lasp.generation.step import CacheStep

__all__ = ["GREEDY", "PADDING", "CacheStep", "GenerationCache", "Sampling"]
